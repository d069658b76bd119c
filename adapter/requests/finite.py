"""Logits that are no numbers: rows whose answer they spoil are found, and the others go on.

Infinity and NaN spread to every later token, and the largest of them is token 0: an answer of "!!!!!!!!" and no error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from policies.errors import UserError

PROMPTS = ("input_ids", "inputs", "inputs_embeds")  # generate's arguments that have a row for each row of the batch


class NonFiniteLogits(UserError):
    """`generate` met logits that are not finite.

    rows: row of the batch -> number of the first token, from 1, that could not be chosen. output: what `generate`
    would have returned, right for all other rows.
    """

    def __init__(self, rows: Mapping[int, int], output: Any, dtype: torch.dtype) -> None:
        self.rows, self.output, self.dtype = dict(rows), output, dtype
        super().__init__("; ".join(f"row {row}: {self.reason(row)}" for row in self.rows))

    def reason(self, row: int) -> str:
        """Why this row has no answer, and what to do."""
        dtype = str(self.dtype).removeprefix("torch.")
        remedy = "float16 overflows with this family: set model.dtype to bfloat16" if dtype == "float16" else \
            "the checkpoint may be damaged: compare it with its publisher's checksums, or try another dtype"
        return f"the logits of token {self.rows[row]} of the answer are not finite in {dtype}; {remedy}"


class FiniteLogits:
    """Which rows' raw logits have been finite so far. It asks the device for nothing before `raise_for`.

    batch: rows of the caller's batch, of which beams and return sequences make more, side by side.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.steps: list[Tensor] = []  # of each step bool [rows]: the logits of an unfinished row are not finite

    def clean(self, logits: Tensor, unfinished: Tensor | None = None) -> Tensor:
        """The raw logits [rows, vocab] of the next step, in place; a row that is not finite becomes zeros, so that
        sampling goes on for the others. unfinished: bool [rows]; the logits of a row that has ended do not matter."""
        bad = ~torch.isfinite(logits.sum(-1, dtype=torch.float32))
        self.steps.append(bad if unfinished is None else bad & unfinished)
        if logits.device.type != "cpu" or bad.any():  # to ask a GPU would make it wait
            logits.masked_fill_(bad[:, None], 0)
        return logits

    def raise_for(self, output: Any, dtype: torch.dtype) -> None:
        """Raises NonFiniteLogits, with `output`, where a row's logits have not been finite."""
        if not self.steps or not (table := torch.stack(self.steps)).any():
            return
        found: dict[int, int] = {}
        for step, row in table.nonzero().tolist():
            found.setdefault(row * self.batch // table.shape[1], step + 1)
        raise NonFiniteLogits(dict(sorted(found.items())), output, dtype)


class _Watch(StoppingCriteria):
    """Follows Transformers' own loop: raw logits as the head gives them, and which rows have ended. It ends rows that
    are not finite. With beams, whose rows change places, every row counts and none is ended."""

    def __init__(self, batch: int, ends: Tensor, beams: bool) -> None:
        self.finite, self.ends, self.beams = FiniteLogits(batch), ends, beams
        self.unfinished: Tensor | None = None

    def after_head(self, module: nn.Module, args: Any, logits: Tensor) -> None:
        """A forward hook of the model's head. logits: [rows, positions, vocab], of which the last one is used."""
        self.finite.clean(logits[:, -1], self.unfinished)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        none = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self.beams or not self.finite.steps or len(self.finite.steps[-1]) != len(input_ids):
            return none
        bad = self.finite.steps[-1]
        ended = bad | torch.isin(input_ids[:, -1], self.ends.to(input_ids.device)).to(bad.device)
        self.unfinished = ~ended if self.unfinished is None else self.unfinished & ~ended
        return bad.to(input_ids.device)


def finite_generate(model: Any) -> Callable[..., Any]:
    """Transformers' own `generate` of a model; it raises NonFiniteLogits instead of answering with token 0."""
    generate = model.generate
    signature = inspect.signature(generate)

    @wraps(generate)
    def checked(*inputs: Any, **kwargs: Any) -> Any:
        call = signature.bind(*inputs, **kwargs)
        given = call.arguments | call.arguments.get("kwargs", {})
        prompt = next((given[name] for name in PROMPTS if given.get(name) is not None), None)
        if prompt is None:
            return generate(*inputs, **kwargs)
        defaults = given.get("generation_config") or model.generation_config

        def setting(name: str) -> Any:
            return given.get(name, getattr(defaults, name, None))

        ends = setting("eos_token_id")
        ends = torch.as_tensor([-1] if ends is None else ends).reshape(-1)
        watch = _Watch(len(prompt), ends, (setting("num_beams") or 1) > 1)
        call.arguments["stopping_criteria"] = StoppingCriteriaList([*(given.get("stopping_criteria") or ()), watch])
        hook = model.get_output_embeddings().register_forward_hook(watch.after_head)
        try:
            output = generate(*call.args, **call.kwargs)
        finally:
            hook.remove()
        watch.finite.raise_for(output, model.dtype)
        return output

    return checked
