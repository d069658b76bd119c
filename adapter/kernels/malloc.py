"""What glibc's malloc gives back to the system, and when."""

from __future__ import annotations

import ctypes
from contextlib import suppress

KEPT_BYTES = 1 << 28  # of freed memory: more than what a prompt's layers take and give back, layer after layer
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def give_back() -> None:
    """Return freed memory to the system, hundreds of megabytes while a model is loaded. No setting is changed."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def keep() -> None:
    """From now on let this process keep what it frees, for the next request: else every layer of a prompt would get
    its activations from the system anew, page by page.

    It changes malloc for the whole process: for commands of this project, never in a process of a user's script.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TOP_PAD, KEPT_BYTES >> 2)
