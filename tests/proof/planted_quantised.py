"""Faults of a reader of quantised files, each planted alone: one matrix of every rank is read again with the fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planted import MLP, Fault, param

from adapter.checkpoint.quantised import Awq
from adapter.checkpoint.quantised.form import Form
from adapter.planning.load import checked_plan

NAME = f"{MLP}.down_proj"


@dataclass(frozen=True)
class NaturalOrder(Awq):
    """AWQ's words as if their outputs came in order: the even ones of eight in the low half are taken for the first."""

    def block(self, shape: tuple[int, ...], outputs: Any, inputs: Any, fetch: Any) -> Any:
        order = [8 * (i // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[i % 8] for i in range(shape[0])]
        return super().block(shape, outputs, inputs, fetch)[order]


def reread(wrong: Callable[[Any], Form], shifted: str = "") -> Callable[..., None]:
    """wrong: the form to read with, of the right one. shifted: a stored tensor that comes a group or block late."""
    def plant(modules: Any, plan: Any, tp: Any) -> None:
        _, checkpoint = checked_plan(Path(modules[""].config.name_or_path), tp.size, "float32")
        sound, part = checkpoint.read_stored, plan.slice(NAME, "weight", tp.rank)
        checkpoint.read_stored = lambda name, piece: (
            sound(name, piece).roll(1, -1) if shifted and name.endswith(shifted) else sound(name, piece))
        checkpoint.form = wrong(checkpoint.form)
        dtype = modules[NAME].weight.dtype
        modules[NAME].weight = param(checkpoint.read(f"{NAME}.weight", part).to(dtype))
    return plant


QUANTISED_FAULTS = {
    "awq": ("AWQ words in natural order", Fault(reread(lambda form: NaturalOrder(4, form.group)), NAME, tensors=True)),
    "gptq4": ("GPTQ zeros one too small",
              Fault(reread(lambda form: replace(form, less_one=False)), NAME, tensors=True)),
    "fp8": ("FP8 scales of the neighbour's block",
            Fault(reread(lambda form: form, "weight_scale_inv"), NAME, tensors=True)),
}
