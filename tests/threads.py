"""The ranks of a group as threads: real Groups whose gathers go from thread to thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adapter.parallel.group import Group, Route

PATIENCE_S = 60


def in_ranks(size: int, do: Callable[[Group], Any]) -> tuple[list[Any], list[int]]:
    """do(group) of every rank, at once -> what each returned or raised, and how many values each gather took of a rank.

    A gather of unlike lengths or dtypes is an AssertionError on every rank, where real ranks would hang or crash.
    """
    table: list[Any] = [None] * size
    results: list[Any] = [None] * size
    barrier, sent = threading.Barrier(size), list[int]()

    def route(rank: int) -> Route:
        def all_gather(out: Tensor, x: Tensor, group: Any) -> None:
            table[rank] = x.clone()
            if barrier.wait(PATIENCE_S) == 0:
                sent.append(len(x))
            parts = list(table)
            barrier.wait(PATIENCE_S)
            assert len({(len(part), part.dtype) for part in parts}) == 1, [(len(p), p.dtype) for p in parts]
            out.copy_(torch.cat(parts))

        def all_reduce(x: Tensor, group: Any) -> None:
            raise NotImplementedError

        return Route("threads", all_reduce, all_gather)

    def work(rank: int) -> None:
        try:
            results[rank] = do(Group(rank, size, route=route(rank)))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    return results, sent
