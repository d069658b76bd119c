"""Give a job's batches to its replicas, first come, first served, and bring their answers to rank 0.

All goes through torch's key-value store of the job, a few hundred bytes a request: which batch is next, the rows that
came of one, and a count of steps by which a replica that hangs is distinguished from one that is slow.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed import HashStore, PrefixStore, Store
from transformers import StoppingCriteria

from adapter.parallel.parallel_state import Mpu
from adapter.parallel.rendezvous import TIMEOUT
from policies.errors import CheckFailed

Rows = list[dict[str, Any]]


class BatchQueue:
    """One replica's end of the queue of a job's batches; of its ranks only the first has one. batches: how many."""

    def __init__(self, store: Store, batches: int, replica: int = 0, replicas: int = 1) -> None:
        self.batches, self.replica, self.replicas = batches, replica, replicas
        self._store, self._collected = store, set[int]()
        self._signs, self._since = -1, 0.0

    def take(self) -> Iterator[int]:
        """Yield numbers of batches for this replica to do, each given to one replica only."""
        number = self.replica  # each has one, whoever comes first
        while number < self.batches:
            self._store.set(f"replica/{number}", str(self.replica))
            yield number
            number = self.replicas + self._store.add("taken", 1) - 1

    def post(self, number: int, rows: Rows) -> None:
        """Report the rows of a batch."""
        self._store.set(f"rows/{number}", json.dumps(rows))
        self._store.add("posted", 1)
        self.sign()

    def collect(self) -> Iterator[tuple[int, Rows]]:
        """Yield, on rank 0, the batches posted since the last call as (number, rows)."""
        for number in range(min(self.batches, self.replicas + self._store.add("taken", 0))):
            if number not in self._collected and self._store.check([f"rows/{number}"]):
                self._collected.add(number)
                yield number, json.loads(self._store.get(f"rows/{number}"))
                self._store.delete_key(f"replica/{number}")
                self._store.delete_key(f"rows/{number}")

    def finished(self) -> bool:
        """Whether every batch is posted. Raises CheckFailed where no replica has made a step for `TIMEOUT`."""
        if self._store.add("posted", 0) == self.batches:
            return True
        signs, now = self._store.add("signs", 0), time.monotonic()
        if signs != self._signs:
            self._signs, self._since = signs, now
        elif now - self._since > TIMEOUT.total_seconds():
            raise CheckFailed(f"no replica has made a step for {TIMEOUT}; still out: {', '.join(self._out())}. Look at "
                              "the ranks of those replicas: stopped, or stuck in a collective")
        return False

    def sign(self) -> None:
        """Report that this replica has made a step."""
        self._store.add("signs", 1)

    def _out(self) -> Iterator[str]:
        for number in range(self.batches):  # the rows first: those that are collected go last
            if not self._store.check([f"rows/{number}"]) and self._store.check([f"replica/{number}"]):
                yield f"batch {number + 1} (replica {self._store.get(f'replica/{number}').decode()})"


class ProgressTicks(StoppingCriteria):
    """Counts the steps of `generate` as signs of life of its replica; stops nothing."""

    def __init__(self, queue: BatchQueue) -> None:
        self._queue = queue

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """input_ids: int64 [B, S]. Returns B times False."""
        self._queue.sign()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def join_queue(mpu: Mpu, batches: int) -> BatchQueue:
    """Return this rank's queue; every rank of the job must call it."""
    job = mpu.world.agreed(secrets.randbits(62))  # a name of its own in the store
    if mpu.replicas.size == 1:
        return BatchQueue(HashStore(), batches)
    store = torch.distributed.distributed_c10d._get_default_store()
    return BatchQueue(PrefixStore(f"batches/{job}", store), batches, mpu.replicas.rank, mpu.replicas.size)
