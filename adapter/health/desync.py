"""Compare the ranks while they generate, by digests of what every rank must have alike (tensor_parallel.desync_check).

A tensor-parallel rank whose tokens, positions or images differ from the others' goes on silently: the sums mix two
answers, and when one rank meets its end-of-sequence token first, the others wait for it in a collective for ever.
`checked_generate` compares the ranks before every k-th step and once more after `generate`. Step 1 reads the prompt;
each step ends with its sampled token (beams: one per beam).

At k = 1 a rank that leaves the loop meets the others where they compare, and all stop. At k > 1 differences are found
up to k - 1 steps late, with the number of their step; a rank that leaves between two comparisons leaves the others in a
collective that it does not enter, which adapter.health.watchdog reports. Digests are of bits: ranks on unlike
processors may differ in image features without a fault.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from adapter.checkpoint.digest import digest, unlike
from adapter.model.published import PublishedModules
from adapter.parallel.group import Group, exchange
from adapter.planning.plan import Plan
from policies.errors import CheckFailed

IDS, SHAPES, POSITIONS, FEATURES = "input ids", "input shapes", "position ids", "image features"
TOKEN, LEAVING = "sampled token", "end of generation"
INPUTS_ADVICE = "Give every rank rank 0's inputs, as adapter.requests.batching.share does: ids, masks and pixels"
ADVICE = {
    TOKEN: "Give every rank the same generation arguments, and logits processors that draw from torch's generator only",
    LEAVING: "Give every rank the same generation arguments, and stopping criteria that look at no clock (max_time)",
}
Seen = Sequence[Any]  # step, quantity, digest; a step may have several of one quantity


class Desync(CheckFailed):
    """The ranks do not compute the same thing any more; raised on every rank."""


def checked_generate(model: nn.Module, plan: Plan, tp: Group, every: int) -> Callable[..., Any]:
    """The model's `generate`, which compares the ranks of `tp` every `every` steps; itself where that is 0.

    Every rank must call it. It raises Desync on every rank.
    """
    generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
    if every == 0 or tp.size == 1:
        return generate
    signature = inspect.signature(generate)

    def checked(*inputs: Any, **kwargs: Any) -> Any:
        call, digests = signature.bind(*inputs, **kwargs), StepDigests(tp, every)
        own = call.arguments.get("stopping_criteria") or ()
        call.arguments["stopping_criteria"] = StoppingCriteriaList([*own, digests])
        with ExitStack() as hooks:
            digests.observe(model, plan, hooks)
            output = generate(*call.args, **call.kwargs)
        digests.leave()
        return output

    return checked


class StepDigests(StoppingCriteria):
    """What this rank has seen since the last comparison. As a stopping criterion it sees the tokens, and stops nothing.

    step: the number of the one under way; the ranks compare before the forward of every `every`-th.
    """

    def __init__(self, tp: Group, every: int) -> None:
        self.tp, self.every, self.step = tp, every, 1
        self.seen = list[Seen]()

    def observe(self, model: nn.Module, plan: Plan, hooks: ExitStack) -> None:
        """See what goes into the model and its text decoder and what comes out of the other encoders, while `hooks` is
        open."""
        names = PublishedModules(model, plan.policy).names
        text, *others = (model.get_submodule(names[stack].rpartition(".")[0]) for stack in plan.geometry.layers)
        hooks.enter_context(model.register_forward_pre_hook(
            lambda _, args, kwargs: self.before_forward(args, kwargs), with_kwargs=True))
        hooks.enter_context(text.register_forward_pre_hook(
            lambda _, args, kwargs: self.add(POSITIONS, kwargs.get("position_ids")), with_kwargs=True))
        for encoder in others:
            hooks.enter_context(encoder.register_forward_hook(lambda _, args, output: self.add(FEATURES, output)))

    def add(self, quantity: str, value: Any) -> None:
        self.seen.append((self.step, quantity, digest(value)))

    def before_forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Compares before the step's first collective, which ranks with inputs of different shapes do not survive."""
        self.add(IDS, [args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")])
        self.add(SHAPES, {name: tuple(x.shape) for name, x in sorted(kwargs.items()) if isinstance(x, Tensor)})
        if (self.step - 1) % self.every == 0:
            self.compare()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids: int64 [B, S], of which the last column is new. Returns B times False."""
        self.add(TOKEN, input_ids[:, -1])
        self.step += 1
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def leave(self) -> None:
        """The last comparison: this rank has returned from `generate`. Raises Desync."""
        self.seen.append((self.step - 1, LEAVING, 1))
        self.compare()

    def compare(self) -> None:
        """Gather one digest of each rank's rows; the rows themselves only where these differ. Raises Desync."""
        seen, self.seen = self.seen, []
        digests = self.tp.gather_integers([digest(repr(seen))])
        if any(other != digests[0] for other in digests):
            raise Desync(message([row["seen"] for row in exchange(self.tp, {"seen": seen})]))


def message(ranks: Sequence[Sequence[Seen]]) -> str:
    """One sentence for all that differs in the earliest step in which anything does, and what to do. Later steps differ
    because of it. ranks: what each rank has seen, which is not the same."""
    digests: dict[tuple[int, str], list[tuple[int, ...]]] = {}  # (step, quantity) -> each rank's digests
    for rank, seen in enumerate(ranks):
        for step, quantity, value in seen:
            digests.setdefault((step, quantity), [()] * len(ranks))[rank] += (value,)
    differing = {key: unlike(column) for key, column in digests.items() if len(set(column)) > 1}
    first = min(step for step, _ in differing)
    found = {quantity: odd for (step, quantity), odd in differing.items() if step == first}
    what = ", ".join(f"{quantity} on rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))}"
                     for quantity, odd in found.items())
    return (f"desync at step {first} (step 1 reads the prompt), unlike the other ranks: {what}. "
            f"{ADVICE.get(next(iter(found)), INPUTS_ADVICE)}. Where that is so already, the weights, library versions "
            "or memory of that rank differ. Found by tensor_parallel.desync_check; every rank stops here")
