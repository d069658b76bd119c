"""How far each rank has come in the collectives of its job, in memory that the other processes of its host can read."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "broadcast", "barrier")
ALL_REDUCE, ALL_GATHER, BROADCAST, BARRIER = range(4)


@dataclass(frozen=True)
class CollectiveState:
    """How far a rank has come: the number of its collectives so far, whether it is inside the last one, and its kind.

    values: elements that it gives to the last one; two ranks are in the same collective where kind and values agree.
    On an accelerator a rank is inside only while it enqueues: a device runs behind, and may wait long after that.
    """

    entered: int
    inside: bool
    kind: int
    values: int

    @property
    def what(self) -> str:
        return f"{KINDS[self.kind]} of {self.values} values" if self.kind < BARRIER else KINDS[self.kind]


class Progress:
    """A rank's CollectiveState, in memory without a name, which other processes of the host read through /proc
    (adapter.health.watchdog).

    A context manager: within, the rank is inside the collective that `entering` announced.
    """

    def __init__(self) -> None:
        """Raises OSError where the system has no such memory to give."""
        self.file = os.fdopen(os.memfd_create("collectives"), "r+b", buffering=0)
        self.file.truncate(mmap.PAGESIZE)
        self._words = memoryview(mmap.mmap(self.file.fileno(), mmap.PAGESIZE)).cast("q")

    def entering(self, kind: int, values: int) -> Progress:
        self._words[2], self._words[3] = kind, values
        return self

    def __enter__(self) -> None:
        self._words[0] += 1

    def __exit__(self, *error: object) -> None:
        self._words[1] = self._words[0]

    def state(self) -> CollectiveState:
        return read_state(self._words)


def hash_of_boot() -> int:
    """A number that only processes of the same running host and pid namespace share."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return (int(file.read().replace("-", "")[:8], 16) << 31) ^ os.stat("/proc/self/ns/pid").st_ino


def open_progress(pid: int, fd: int) -> memoryview:
    """Another process's Progress, read-only. Raises OSError where this process may not look at it."""
    with open(f"/proc/{pid}/fd/{fd}", "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE, access=mmap.ACCESS_READ)).cast("q")


def read_state(words: memoryview) -> CollectiveState:
    """The state in a Progress, of this process or another."""
    entered, left, kind, values = words[:4].tolist()
    return CollectiveState(entered, left < entered, kind, values)
