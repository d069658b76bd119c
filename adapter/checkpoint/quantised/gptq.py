"""GPTQ as AutoGPTQ, optimum and GPTQModel write it: 4 or 8 bits, codes packed along inputs, zeros along outputs."""

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
from policies.rules import Range, TensorSlice

if TYPE_CHECKING:
    from torch import Tensor

ONES = {4: 0x11111111, 8: 0x01010101}  # 1 in each field of a word
VERSIONS = {"gptq": True, "gptq_v2": False}  # checkpoint_format -> whether zeros are stored less one


@dataclass(frozen=True)
class Gptq(Form):
    """weight[o, i] = scales[g, o] * (q[i, o] - z[g, o]) where g = g_idx[i], the group of input i.

    qweight int32 [inputs * bits / 32, outputs], qzeros int32 [groups, outputs * bits / 32], scales [groups, outputs],
    g_idx int32 [inputs], in any order: with desc_act the inputs of a group are not neighbours.
    less_one: version 1 of the format, where the *word* qzeros + 0x11111111 (0x01010101 with 8 bits) has the zeros. That
    is how GPTQModel reads and writes it (utils/model.py, convert_gptq_v1_to_v2_format_module); a field at its largest
    carries into the next one.
    """

    group: int
    less_one: bool
    dtypes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS, "g_idx": ("I32",)}
    spare: ClassVar[tuple[str, ...]] = ("bias",)  # older writers give every layer one

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Gptq:
        """The form that a quantization_config states. Raises UserError where it is another kind of GPTQ."""
        version, bits = stated(section, ("checkpoint_format", "format"), "gptq"), number(section, "bits", 4)
        if version not in VERSIONS or section.get("is_marlin_format"):
            version = "marlin" if section.get("is_marlin_format") else version
            raise UserError(f"GPTQ in the format {version!r} is laid out for one kernel; use a release in the format "
                            "gptq or gptq_v2")
        if bits not in ONES:
            raise UserError(f"GPTQ with {bits} bits is not read; use a release with 4 or 8")
        return cls(bits, group_size(section), VERSIONS[version])

    def __str__(self) -> str:
        return f"GPTQ, {self.bits} bits, groups of {self.group if self.group > 0 else 'whole rows'}"

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        outputs, inputs = shape
        groups = covering((0, inputs), self.group if self.group > 0 else inputs)[1]
        return {"qweight": (-(-inputs // self.per_word), outputs), "qzeros": (groups, -(-outputs // self.per_word)),
                "scales": (groups, outputs), "g_idx": (inputs,)}

    def block(self, shape: tuple[int, ...], outputs: Range, inputs: Range, fetch: Fetch) -> Tensor:
        from adapter.checkpoint.quantised.arithmetic import scaled, unpacked

        stored, natural = self.shapes(shape), range(self.per_word)
        whole = TensorSlice(stored["g_idx"])
        group = fetch("g_idx", whole if inputs == (0, shape[1]) else TensorSlice(whole.shape, 0, (inputs,))).long()
        groups = (int(group.min()), int(group.max()) + 1) if len(group) else (0, 0)
        if groups[0] < 0 or groups[1] > stored["scales"][0]:
            raise IndexError(f"g_idx names groups {groups[0]} to {groups[1] - 1}, and there are {stored['scales'][0]}")
        if outputs != (0, shape[0]):
            groups = (0, stored["scales"][0])
        packed, rows = covering(outputs, self.per_word), covering(inputs, self.per_word)
        words = fetch("qweight", window(stored["qweight"], rows, outputs)).t().contiguous()
        zeros = fetch("qzeros", window(stored["qzeros"], groups, packed)).t().long() + ONES[self.bits] * self.less_one
        scales = fetch("scales", window(stored["scales"], groups, outputs)).t()

        def codes(start: int, stop: int) -> Tensor:
            return unpacked(words[start:stop], self.bits, 1, natural)[:, inside(inputs, rows, self.per_word)]

        return scaled(codes, unpacked(zeros, self.bits, 0, natural)[inside(outputs, packed, self.per_word)], scales,
                      group - groups[0])
