"""AWQ, version gemm, as AutoAWQ writes it (awq/modules/linear/gemm.py): 4 bits, zero points, packed along outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapter.checkpoint.quantised.form import (
    FLOATS,
    Fetch,
    Form,
    covering,
    group_size,
    inside,
    number,
    stated,
    window,
)
from policies.errors import UserError
from policies.rules import Range

if TYPE_CHECKING:
    from torch import Tensor

BITS, PER_WORD = 4, 8
FIELDS = (0, 4, 1, 5, 2, 6, 3, 7)  # of the eight outputs of a word: its fields hold outputs 0, 2, 4, 6, 1, 3, 5, 7


@dataclass(frozen=True)
class Awq(Form):
    """weight[o, i] = scales[i / group, o] * (q[i, o] - z[i / group, o]). group: inputs that share a scale; -1: all.

    qweight int32 [inputs, outputs / 8], qzeros int32 [groups, outputs / 8], scales [groups, outputs].
    """

    group: int
    dtypes: ClassVar[Mapping[str, tuple[str, ...]]] = {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS}

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Awq:
        """The form that a quantization_config states. Raises UserError where it is another kind of AWQ."""
        version, bits = stated(section, ("version", "format"), "gemm"), number(section, "bits", BITS)
        if version != "gemm":
            raise UserError(f"AWQ of version {version!r} packs its codes in another order; use a release of version "
                            "gemm, which most are")
        if bits != BITS:
            raise UserError(f"AWQ with {bits} bits is not read; use a release with {BITS}")
        if section.get("zero_point", True) is not True:
            raise UserError("AWQ without zero points is not read; use a release with zero_point: true")
        return cls(bits, group_size(section))

    def __str__(self) -> str:
        return f"AWQ, {BITS} bits, groups of {self.group if self.group > 0 else 'whole rows'}"

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        outputs, inputs = shape
        packed, groups = -(-outputs // PER_WORD), covering((0, inputs), self._group(inputs))[1]
        return {"qweight": (inputs, packed), "qzeros": (groups, packed), "scales": (groups, outputs)}

    def block(self, shape: tuple[int, ...], outputs: Range, inputs: Range, fetch: Fetch) -> Tensor:
        import torch

        from adapter.checkpoint.quantised.arithmetic import scaled, unpacked

        stored, group = self.shapes(shape), self._group(shape[1])
        packed, groups = covering(outputs, PER_WORD), covering(inputs, group)
        words = fetch("qweight", window(stored["qweight"], inputs, packed)).t().contiguous()
        zeros = fetch("qzeros", window(stored["qzeros"], groups, packed)).t()
        scales = fetch("scales", window(stored["scales"], groups, outputs)).t()

        def codes(start: int, stop: int) -> Tensor:
            some = outputs[0] + start, outputs[0] + stop
            around = covering(some, PER_WORD)
            return unpacked(words[around[0] - packed[0]:around[1] - packed[0]], BITS, 0, FIELDS)[
                inside(some, around, PER_WORD)]

        return scaled(codes, unpacked(zeros, BITS, 0, FIELDS)[inside(outputs, packed, PER_WORD)], scales,
                      torch.arange(*inputs) // group - groups[0])

    def _group(self, inputs: int) -> int:
        return self.group if self.group > 0 else inputs
