"""Memory for weights: on huge pages where the system gives them, since all of it is read for every token."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

LEAST_BYTES = 1 << 20  # below, a huge page (2 MB) is mostly waste


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A CPU tensor of this shape, its values undefined. The kernel is asked for huge pages, and may have none."""
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))


def give_back() -> None:
    """Hand what was freed back to the system: glibc keeps it, hundreds of megabytes after a model was loaded."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
