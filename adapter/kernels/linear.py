"""x W^T for every format a weight is held in, and which of them this machine has: the one seam below the layers.

A weight is a plain tensor, or `Quantised`: codes of 8 or 4 bits with a float16 scale for each group of 64 inputs (W =
scale * (code - zero)). There is one copy of each. How it is multiplied depends on device and rows of x:

    plain tensor    CPU, bfloat16: csrc/linear.cpp; more than 16 rows on a processor with tiles (AMX), another dtype or
                    device: F.linear
    quantised       at most 16 rows: csrc/linear.cpp, x quantised to 8 bits per row and group; more rows: parts are
                    unpacked and multiplied in x's dtype
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from adapter.kernels import build
from policies.errors import UserError
from policies.formats import GROUP, Format

log = logging.getLogger("adapter")
FEW_ROWS = 16  # of x, which a quantised weight takes as codes; adapter/kernels/csrc/linear.cpp has the same number


@dataclass(frozen=True)
class Quantised:
    """A matrix [N, inputs] as codes uint8 [N, groups * 8 * bits] and scales float16 [N, groups]; `dtype` is what it
    stands for. A group is 64 inputs or, at the end of a row, fewer.

    4 bits: byte i of a group's 32 holds element i in its low half and element i + 32 in its high half.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    inputs: int
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.codes.shape[0], self.inputs))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """These rows, unpacked."""
        return unpack(self.codes[rows], self.scales[rows], self.bits, self.dtype)[..., :self.inputs].contiguous()

    def dense(self) -> Tensor:
        return self[:]


Weight = Tensor | Quantised


def quantise(weight: Tensor, bits: int) -> Quantised:
    """Nearest codes, symmetric in each group of 64 along the last dimension: scale = largest |w| / (2^(bits-1) - 1).

    weight [N, K]. A group is quantised by itself, so that a slice on group boundaries quantises to the slice of the
    quantised whole.
    """
    rows, inputs = weight.shape
    groups = -(-inputs // GROUP)
    zero = 1 << (bits - 1)
    codes = torch.empty(rows, groups * GROUP * bits // 8, dtype=torch.uint8)
    scales = torch.empty(rows, groups, dtype=torch.float16)
    step = max(1, (1 << 22) // inputs)
    for start in range(0, rows, step):  # in parts, so that the float32 of a large matrix never exists whole
        group = F.pad(weight[start:start + step].float(), (0, groups * GROUP - inputs)).unflatten(-1, (-1, GROUP))
        scale = (group.abs().amax(-1) / (zero - 1)).half().clamp_min(torch.finfo(torch.float16).tiny)
        code = (group / scale.float().unsqueeze(-1)).round_().clamp_(-zero, zero - 1).add_(zero).to(torch.uint8)
        if bits == 4:
            code = code[..., :GROUP // 2] | (code[..., GROUP // 2:] << 4)
        codes[start:start + step], scales[start:start + step] = code.flatten(-2), scale
    return Quantised(codes, scales, bits, inputs, weight.dtype)


def unpack(codes: Tensor, scales: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """codes [*, groups * 8 * bits], scales [*, groups] -> [*, groups * 64] of dtype."""
    code = codes.unflatten(-1, (scales.shape[-1], GROUP * bits // 8))
    if bits == 4:
        code = torch.cat([code & 15, code >> 4], -1)
    zero = 1 << (bits - 1)
    return ((code.float() - zero) * scales.float().unsqueeze(-1)).to(dtype).flatten(-2)


def make_weight(weight: Weight, form: Format) -> Weight:
    """The weight in this format; one that was read in it stays."""
    return quantise(weight, form.bits) if form.bits and isinstance(weight, Tensor) else weight


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [*, K], weight [N, K], bias [N] -> [*, N]."""
    if isinstance(weight, Quantised):
        y = torch.ops.qwenvl_tp.linear_quantised(_rows(x), weight.codes, weight.scales, bias, weight.bits)
    elif x.dtype is torch.bfloat16 and x.device.type == "cpu" and weight.dtype is torch.bfloat16 and missing() is None \
            and x.numel() <= _most_rows() * x.shape[-1]:
        y = torch.ops.qwenvl_tp.linear(_rows(x), weight, bias)
    else:
        return F.linear(x, weight, bias)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 2 and x.is_contiguous() else x.reshape(-1, x.shape[-1]).contiguous()


@cache
def _most_rows() -> int:
    """Rows of a plain product up to which the kernel is the fastest way on this processor."""
    rows: int = torch.ops.qwenvl_tp.linear_rows()
    return rows


@cache
def missing() -> str | None:
    """Why the kernels of adapter/kernels/csrc/linear.cpp cannot be used here, in words; None where they can."""
    if why := build.unavailable():
        return why
    return None if torch.ops.qwenvl_tp.linear_supported() else "this processor lacks AVX-512 BF16 and VNNI"


def check(form: Format, dtype: torch.dtype, device: str) -> None:
    """Raises UserError where a format cannot be computed with on this machine; logs what a plain one falls back to."""
    if form.bits:
        why = missing() if device == "cpu" else f"its kernels are for CPUs, this is {device}"
        if why is None and dtype is torch.float16:
            why = "activations are bfloat16 or float32 there, model.dtype is float16"
        if why:
            raise UserError(f"weights.format {form.name}: not on this machine: {why}; use weights.format=dense")
    elif device == "cpu" and dtype is torch.bfloat16 and (why := missing()):
        log.warning("decoding multiplies with torch's own kernels, at about half the speed: %s", why)
