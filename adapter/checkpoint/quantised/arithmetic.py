"""What the forms of integers have in common: codes packed in words, and their scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PART = 1 << 18  # elements decoded at a time: temporaries in float32 that stay in a core's cache


def unpacked(words: Tensor, bits: int, dim: int, fields: Sequence[int]) -> Tensor:
    """Words of 32 bits [N, M] -> codes uint8, `32 / bits` times as many along `dim`.

    fields: of the codes of a word in order, which field holds each, counted from the lowest bits.
    """
    codes = [(words >> bits * field & (1 << bits) - 1).to(torch.uint8) for field in fields]
    return torch.stack(codes, dim + 1).flatten(dim, dim + 1)


def scaled(codes: Callable[[int, int], Tensor], zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """(code - zero) * scale in float32, which is exact: at most 8 bits times the 11 of a float16.

    codes: (start, stop) -> uint8 [stop - start, inputs], those of some outputs; zeros uint8 and scales [outputs,
    groups]; group int64 [inputs]: that of each input. Returns [outputs, inputs].
    """
    out = torch.empty(len(scales), len(group), dtype=torch.float32)
    step, zeros, scales = max(1, PART // max(1, len(group))), zeros.float(), scales.float()
    for start in range(0, len(out), step):
        rows, stop = slice(start, start + step), min(start + step, len(out))
        torch.sub(codes(start, stop), zeros[rows].index_select(1, group), out=out[rows])
        out[rows].mul_(scales[rows].index_select(1, group))
    return out


def scaled_blocks(weight: Tensor, scales: Tensor, row_block: Tensor, column_block: Tensor) -> Tensor:
    """weight [N, M] in 8 bits * scales [blocks, blocks] of the block of each element, in float32."""
    out = torch.empty(weight.shape, dtype=torch.float32)
    step, scales = max(1, PART // max(1, weight.shape[1])), scales.float()
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        beside = scales.index_select(0, row_block[rows]).index_select(1, column_block)
        torch.mul(weight[rows].float(), beside, out=out[rows])
    return out
