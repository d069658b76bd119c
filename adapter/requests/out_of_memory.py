"""Memory that runs out while a batch is generated: a smaller one is tried where every rank can, else the job ends.

What can be agreed on, and what cannot: ranks of the same size run out at the same operation, so they have taken part in
the same collectives and can go on together. A rank that runs out alone leaves the others inside a collective, which
nothing can take back; it says so and ends, and the watchdog ends the others. Ranks tell each other through the job's
key-value store, never by a collective. Where Linux kills a process for its memory there is no error to catch.
"""

from __future__ import annotations

import gc
import secrets
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from deepspeed.accelerator import get_accelerator
from torch.distributed import PrefixStore, Store

from adapter.parallel.group import Group
from adapter.parallel.parallel_state import Mpu
from policies.errors import UserError

WAIT = timedelta(seconds=20)  # for the other ranks of a replica to say that they are out of memory too
T = TypeVar("T")


class OutOfMemory(Exception):
    """There is no memory for a batch, on any rank of this replica; they are all ready for the next."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch's CPU allocator or an accelerator's could not allocate."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class MemoryGuard:
    """Runs work that all ranks of a replica do together, each through its own guard, call for call.

    store: where they report to each other; None for one rank alone.
    """

    def __init__(self, tp: Group = Group(0, 1), store: Store | None = None) -> None:  # noqa: B008
        self._tp, self._store, self._calls = tp, store, 0

    def run(self, work: Callable[[], T]) -> T:
        """What `work` returns. Raises OutOfMemory where every rank ran out at the same collective, and UserError, which
        ends the job, where only this one did."""
        self._calls += 1
        before, reason = self._collectives(), ""
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).split("\n")[0] or type(error).__name__
        gc.collect()  # the error is gone, and with it the frames that held the batch's tensors
        get_accelerator().empty_cache()
        if self._tp.size > 1:
            self._agree(self._collectives() - before, reason)
        raise OutOfMemory(reason)

    def _collectives(self) -> int:
        return 0 if self._tp.progress is None else self._tp.progress.state().entered

    def _agree(self, done: int, reason: str) -> None:
        assert self._store is not None
        keys = [f"{self._calls}/{rank}" for rank in range(self._tp.size)]
        self._store.set(keys[self._tp.rank], str(done))
        try:
            self._store.wait(keys, WAIT)
            where = [int(self._store.get(key)) for key in keys]
        except (RuntimeError, ValueError):  # the store's own error types differ between releases of torch
            where = []
        if self._tp.progress is None or len(set(where)) != 1:
            raise UserError(f"out of memory on rank {self._tp.root + self._tp.rank} and not on every rank of its "
                            f"replica at the same step ({reason}). The others wait in a collective, so this batch "
                            "cannot be tried again in this job; lower batch_size, generation.max_new_tokens or "
                            "processor.max_pixels and start it again")


def guard_replica(mpu: Mpu) -> MemoryGuard:
    """This rank's guard; every rank of the job must call it."""
    job = mpu.world.agreed(secrets.randbits(62))  # a name of its own in the store
    if mpu.tp.size == 1:
        return MemoryGuard()
    store = torch.distributed.distributed_c10d._get_default_store()
    return MemoryGuard(mpu.tp, PrefixStore(f"memory/{job}/{mpu.replicas.rank}", store))
