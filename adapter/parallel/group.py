"""One rank's view of a group of ranks, the ways it can sum, and the small JSON objects that ranks exchange."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from adapter.parallel.progress import ALL_GATHER, ALL_REDUCE, BARRIER, BROADCAST, Progress


def to_device(x: Tensor) -> Tensor:
    """`x` where this rank computes and communicates."""
    return x.to(get_accelerator().current_device_name())


@dataclass(frozen=True)
class Route:
    """One way to sum and gather over a group.

    all_reduce: (x, torch's group) -> in place; all_gather: (out, x, torch's group), out every rank's flat x in turn.
    busy_waits: whether a rank that waits in it keeps a core busy.
    """

    name: str
    all_reduce: Callable[[Tensor, Any], object]
    all_gather: Callable[[Tensor, Tensor, Any], object]
    busy_waits: bool = False


def _torch_all_reduce(x: Tensor, group: Any) -> None:
    dist.all_reduce(x, group=group)


def torch_all_gather(out: Tensor, x: Tensor, group: Any) -> None:
    dist.all_gather_into_tensor(out, x, group=group)


TORCH = Route("torch group", _torch_all_reduce, torch_all_gather)


@dataclass(frozen=True)
class Group:
    """One rank's view of a group of ranks.

    rank: this process's number in the group; root: which rank of the whole job is number 0 of it.
    group: torch's; None is the whole job. route: the way it sums and gathers.
    progress: where its collectives are counted for the other ranks to see; None: nowhere.
    """

    rank: int
    size: int
    group: Any = None
    route: Route = TORCH
    root: int = 0
    progress: Progress | None = field(default=None, compare=False, repr=False)

    def _in(self, kind: int, values: int = 0) -> AbstractContextManager[None]:
        return nullcontext() if self.progress is None else self.progress.entering(kind, values)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of `x` over the group, in place, on every rank bit for bit the same."""
        if self.size == 1:
            return x
        x = x.contiguous()  # DeepSpeed's shared-memory op takes strided memory without reducing it
        with self._in(ALL_REDUCE, x.numel()):
            self.route.all_reduce(x, self.group)
        return x

    def all_gather_last(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Concatenate every rank's `x` along the last dimension, whose length on rank r is sizes[r]."""
        if self.size == 1:
            return x
        widest = max(sizes)
        if x.shape[-1] < widest:
            x = torch.nn.functional.pad(x, (0, widest - x.shape[-1]))
        out = x.new_empty(self.size * x.numel())
        with self._in(ALL_GATHER, x.numel()):
            self.route.all_gather(out, x.reshape(-1), self.group)
        parts = out.view(self.size, *x.shape)
        return torch.cat([part[..., :n] for part, n in zip(parts, sizes, strict=True)], dim=-1)

    def gather_integers(self, mine: Sequence[int]) -> list[list[int]]:
        """Every rank's integers, of 64 bits and as many on each, by rank."""
        x = to_device(torch.tensor(mine, dtype=torch.int64))
        rows: list[list[int]] = self.all_gather_last(x, (len(mine),) * self.size).view(self.size, -1).tolist()
        return rows

    def broadcast(self, x: Tensor) -> Tensor:
        """The first rank's `x` on every rank, in place."""
        if self.size > 1:
            with self._in(BROADCAST, x.numel()):
                dist.broadcast(x, src=self.root, group=self.group)
        return x

    def agreed(self, value: int) -> int:
        """The first rank's `value` on every rank."""
        return int(self.broadcast(to_device(torch.tensor([value]))))

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            with self._in(BARRIER):
                dist.barrier(group=self.group)


def exchange(world: Group, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every rank's `facts`, a JSON object of any length, by rank. Every rank must call it."""
    mine = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    lengths = tuple(length for (length,) in world.gather_integers([len(mine)]))  # first: each rank knows its own only
    every = world.all_gather_last(to_device(mine), lengths).cpu()
    return [json.loads(bytes(part.tolist())) for part in every.split(lengths)]
