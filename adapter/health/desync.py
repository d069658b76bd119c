"""Do all ranks still compute the same thing? Digests of what every rank must have alike, compared while it generates.

A tensor-parallel rank whose tokens, positions or pictures differ from the others' goes on silently: the sums mix two
answers, and when one rank meets its end-of-sequence token first, the others wait for it in a collective for ever.
`checked_generate` compares ranks after every k-th step, before any of them enters the next one, and once more when
`generate` is through. Step 1 reads the prompt; each step ends with its sampled token (beams: one per beam).

At k = 1 a rank that leaves the loop, for whatever reason, meets the others where they compare, and all stop. At k > 1
every step's digests are still compared, with the step's own number, but up to k - 1 steps late; and a rank that leaves
the loop between two comparisons leaves the others in a collective that it does not enter. Nothing here sees that;
adapter.health.watchdog does, from outside, and names the ranks within seconds.

Digests are of bits. Features come out of sums that are the same bits on every rank and of replicated arithmetic, so
ranks on unlike processors may differ there without a fault.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from adapter.checkpoint.digest import pieces, to_int64, unlike
from adapter.parallel.group import Group
from adapter.planning.plan import Plan
from policies.errors import CheckFailed

IDS, SHAPES, POSITIONS, FEATURES, TOKEN = QUANTITIES = (  # of a step, in the order in which they arise
    "input ids", "input shapes", "position ids", "image features", "sampled token")
LEAVING = "end of generation"

SAME_INPUTS = "Give every rank rank 0's inputs, as adapter.requests.batching.share does"
SAME_MACHINE = "Where that is so already, the weights, library versions or memory of that rank differ"
ADVICE = {
    IDS: SAME_INPUTS,
    SHAPES: SAME_INPUTS,
    POSITIONS: f"{SAME_INPUTS}: ids, attention mask and picture grids alike",
    FEATURES: f"{SAME_INPUTS}: pixels alike. {SAME_MACHINE}",
    TOKEN: "Give every rank the same generation arguments and logits processors, which take random numbers from "
           f"torch's generator only. {SAME_MACHINE}",
    LEAVING: "Give every rank the same generation arguments; a stopping criterion must decide alike on all, which one "
             "that looks at a clock (max_time) does not",
}


class Desync(CheckFailed):
    """The ranks do not compute the same thing any more; raised on every rank."""


@dataclass(frozen=True)
class Disagreement:
    """ranks: those unlike the majority, or unlike rank 0 where no value has more ranks than another."""

    step: int
    quantity: str
    ranks: tuple[int, ...]


def checked_generate(model: nn.Module, plan: Plan, tp: Group, every: int) -> Callable[..., Any]:
    """The model's `generate`, which compares the ranks of `tp` every `every` steps; itself where that is 0.

    Every rank must call it. It raises Desync on every rank.
    """
    generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
    if every == 0 or tp.size == 1:
        return generate
    signature = inspect.signature(generate)

    def checked(*inputs: Any, **kwargs: Any) -> Any:
        call, steps = signature.bind(*inputs, **kwargs), Steps(tp, every)
        own = call.arguments.get("stopping_criteria") or ()
        call.arguments["stopping_criteria"] = StoppingCriteriaList([*own, steps])
        with _observed(model, plan, steps):
            output = generate(*call.args, **call.kwargs)
        steps.compare(leaving=True)
        return output

    return checked


@contextmanager
def _observed(model: nn.Module, plan: Plan, steps: Steps) -> Iterator[None]:
    """Within, `steps` sees what goes into the model and its text encoder and what comes out of the other encoders."""
    names = {plan.policy.published(name): name for name, _ in model.named_modules()}
    text, *others = (model.get_submodule(names[stack].rpartition(".")[0]) for stack in plan.geometry.layers)
    hooks = [
        model.register_forward_pre_hook(steps.before_forward, with_kwargs=True),
        text.register_forward_pre_hook(steps.before_text, with_kwargs=True),
        *(encoder.register_forward_hook(steps.after_vision) for encoder in others),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Steps(StoppingCriteria):
    """Digests of the steps since the last comparison. As a stopping criterion it sees the tokens, and stops nothing."""

    def __init__(self, tp: Group, every: int) -> None:
        self.tp, self.every = tp, every
        self.first = 1  # number of the first step in `rows`
        self.rows = [Digests()]  # one per step; the last is under way
        self.due = 0  # steps that are through when the ranks compare next

    @property
    def done(self) -> int:
        return self.first + len(self.rows) - 2

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Compares before the step's first collective, which ranks with inputs of different shapes do not survive."""
        now = self.rows[-1]
        now.add(IDS, [args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")])
        now.add(SHAPES, {name: tuple(x.shape) for name, x in sorted(kwargs.items()) if isinstance(x, Tensor)})
        if self.done >= self.due:
            self.compare()

    def before_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.rows[-1].add(POSITIONS, kwargs.get("position_ids"))

    def after_vision(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.rows[-1].add(FEATURES, output)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids: int64 [B, S], of which the last column is new. Returns B times False."""
        self.rows[-1].add(TOKEN, input_ids[:, -1])
        self.rows.append(Digests())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def compare(self, leaving: bool = False) -> None:
        """One gather of 5 * every + 3 int64s. The step under way takes part with what is known before its forward.

        leaving: this rank is through with `generate`. Raises Desync.
        """
        *through, now = self.rows
        through += [Digests()] * (self.every - len(through))
        mine = [row.value(q) for row in through for q in QUANTITIES] + [int(leaving), now.value(IDS), now.value(SHAPES)]
        labels = [(self.first + i, q) for i in range(len(through)) for q in QUANTITIES]
        labels += [(self.done, LEAVING), (self.done + 1, IDS), (self.done + 1, SHAPES)]
        row = torch.tensor(mine).to(get_accelerator().current_device_name())
        table = self.tp.all_gather_last(row, (len(mine),) * self.tp.size).view(self.tp.size, -1).tolist()
        if found := disagreements(labels, table):
            raise Desync(message(found))
        self.first, self.rows, self.due = self.done + 1, [now], self.done + self.every


class Digests:
    """A digest for each quantity of one step, of all that was added to it, in order."""

    def __init__(self) -> None:
        self._hashes = {quantity: hashlib.blake2b(digest_size=8) for quantity in QUANTITIES}

    def add(self, quantity: str, value: Any) -> None:
        for piece in pieces(value):
            self._hashes[quantity].update(piece)

    def value(self, quantity: str) -> int:
        """As an int64."""
        return to_int64(self._hashes[quantity].digest())


def disagreements(labels: Sequence[tuple[int, str]], table: Sequence[Sequence[int]]) -> list[Disagreement]:
    """What differs in the earliest step in which anything does. labels: (step, quantity) of each column, in order of
    steps; table: a row per rank. The columns after it differ because it does."""
    found = [Disagreement(*label, unlike(column))
             for label, column in zip(labels, zip(*table, strict=True), strict=True) if len(set(column)) > 1]
    return [d for d in found if d.step == found[0].step]


def message(found: Sequence[Disagreement]) -> str:
    what = ", ".join(f"{d.quantity} on {ranks_in_words(d.ranks)}" for d in found)
    return (f"desync at step {found[0].step} (step 1 reads the prompt), unlike the other ranks: {what}. "
            f"{ADVICE[found[0].quantity]}. Found by tensor_parallel.desync_check; every rank stops here")


def ranks_in_words(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
