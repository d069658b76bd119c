"""FP8 in blocks, as DeepSeek-V3 and Qwen3-VL's FP8 releases have it: 8-bit floats, a scale for each block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapter.checkpoint.quantised.form import FLOATS, MOST, Fetch, Form, covering, stated, window
from policies.errors import UserError
from policies.rules import Range

if TYPE_CHECKING:
    from torch import Tensor

ADVICE = "use a release with weight_block_size, or the one in bfloat16"


@dataclass(frozen=True)
class Fp8(Form):
    """weight[o, i] = float(weight[o, i]) * weight_scale_inv[o / rows, i / columns]: a scale for a block.

    weight float8_e4m3fn [outputs, inputs]; weight_scale_inv [blocks, blocks]; the last block of a side may be smaller.
    """

    rows: int
    columns: int
    dtypes: ClassVar[Mapping[str, tuple[str, ...]]] = {"weight": ("F8_E4M3",), "weight_scale_inv": FLOATS}

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Fp8:
        """The form that a quantization_config states. Raises UserError where it is another kind of FP8."""
        if (fmt := stated(section, ("fmt",), "e4m3")) not in ("e4m3", "float8_e4m3fn"):
            raise UserError(f"FP8 of the format {fmt!r} is not read; e4m3 is")
        if (scheme := stated(section, ("activation_scheme",), "dynamic")) != "dynamic":
            raise UserError(f"FP8 with activation_scheme {scheme!r} has stored scales of activations, which are not "
                            "read; use a release with activation_scheme: dynamic, or the one in bfloat16")
        if (scales := stated(section, ("scale_fmt",), "float")) != "float":
            raise UserError(f"FP8 with scales as {scales!r} is not read; {ADVICE} and scales in floats")
        block = section.get("weight_block_size")
        if block is None:
            raise UserError(f"FP8 with one scale for a whole tensor or row is not read; {ADVICE}")
        if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n <= MOST for n in block)):
            raise UserError(f"quantization_config.weight_block_size = {str(block)[:60]}: two positive numbers "
                            "are needed")
        return cls(8, *block)

    def __str__(self) -> str:
        return f"FP8, blocks of {self.rows} x {self.columns}"

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"weight": shape, "weight_scale_inv": (-(-shape[0] // self.rows), -(-shape[1] // self.columns))}

    def block(self, shape: tuple[int, ...], outputs: Range, inputs: Range, fetch: Fetch) -> Tensor:
        import torch

        from adapter.checkpoint.quantised.arithmetic import scaled_blocks

        above, beside = covering(outputs, self.rows), covering(inputs, self.columns)
        scales = fetch("weight_scale_inv", window(self.shapes(shape)["weight_scale_inv"], above, beside))
        return scaled_blocks(fetch("weight", window(shape, outputs, inputs)), scales,
                             torch.arange(*outputs) // self.rows - above[0],
                             torch.arange(*inputs) // self.columns - beside[0])
