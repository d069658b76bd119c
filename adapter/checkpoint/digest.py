"""Digests of tensors, and which ranks have another one than the rest."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def digest(value: Any) -> int:
    """An int64 for all that is in a value: of tensors their dtype, shape and bytes. Other values, other digests."""
    hasher = hashlib.blake2b(digest_size=8)
    for chunk in chunks(value):
        hasher.update(chunk)
    return to_int64(hasher.digest())


def to_int64(eight_bytes: bytes) -> int:
    return int.from_bytes(eight_bytes, "little", signed=True)


def chunks(value: Any) -> Iterator[Any]:
    """The bytes of every tensor in a value, with dtype and shape, and what else is in it in words."""
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        flat = value.detach().cpu().reshape(-1)
        if flat.numel() and flat.stride() != (1,):  # of one element too: it cannot be seen as bytes
            flat = flat.clone(memory_format=torch.contiguous_format)
        yield flat.view(torch.uint8).numpy().data
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key).encode()
            yield from chunks(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from chunks(item)
    else:
        yield repr(value).encode()


def unlike(column: Sequence[Hashable]) -> tuple[int, ...]:
    """Ranks whose value is not the most frequent one; among equally frequent ones rank 0's counts."""
    counts = Counter(column)
    usual = max(counts, key=lambda value: (counts[value], value == column[0]))
    return tuple(rank for rank, value in enumerate(column) if value != usual)
