"""What the forms of integers have in common: codes packed in words, and their scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PART = 1 << 22  # elements decoded at a time, so that temporaries in float32 stay small


def unpacked(words: Tensor, bits: int, dim: int, fields: Sequence[int]) -> Tensor:
    """Words of 32 bits [N, M] -> codes uint8, `32 / bits` times as many along `dim`.

    fields: of the codes of a word in order, which field holds each, counted from the lowest bits.
    """
    codes = [(words >> bits * field & (1 << bits) - 1).to(torch.uint8) for field in fields]
    return torch.stack(codes, dim + 1).flatten(dim, dim + 1)


def scaled(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """(code - zero) * scale in float32, which is exact: at most 8 bits times the 11 of a float16.

    codes uint8 [outputs, inputs]; zeros uint8 and scales [outputs, groups]; group int64 [inputs]: that of each input.
    """
    out = torch.empty(codes.shape, dtype=torch.float32)
    step = max(1, PART // max(1, codes.shape[1]))
    for start in range(0, len(codes), step):
        rows = slice(start, start + step)
        torch.sub(codes[rows].float(), zeros[rows].float()[:, group], out=out[rows])
        out[rows].mul_(scales[rows].float()[:, group])
    return out


def scaled_blocks(weight: Tensor, scales: Tensor, row_block: Tensor, column_block: Tensor) -> Tensor:
    """weight [N, M] in 8 bits * scales [blocks, blocks] of the block of each element, in float32."""
    out = torch.empty(weight.shape, dtype=torch.float32)
    step, scales = max(1, PART // max(1, weight.shape[1])), scales.float()
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        torch.mul(weight[rows].float(), scales[row_block[rows]][:, column_block], out=out[rows])
    return out
