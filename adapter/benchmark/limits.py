"""What the machine allows at the moment, and how much of it a model must take at least.

A step of decoding reads every text weight once, a prompt multiplies by every weight once a row: tokens/s cannot be more
than read_gb_s / decode_bytes, the first token cannot come before prefill_flop / matmul_gflop_s. Both leave out the
attention itself, the KV cache and the collectives, so that they are limits and no predictions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import mean

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from adapter.plan import DTYPE_BYTES, Plan
from adapter.topology import Group, to_device
from policies.rules import Head, Vocab

READ_BYTES = 512 << 20  # a rank; beyond any cache
MATMUL = (1024, 1280, 5120)  # rows, in, out: the vision tower's MLP on a picture of 448 x 448
AT_LEAST_S = 0.25  # that each figure is measured for


@dataclass(frozen=True)
class Moment:
    """GB/s and GFLOP/s of every rank, all of them at it at once; powers of ten."""

    read_gb_s: list[float]
    matmul_gflop_s: list[float]

    def between(self, other: Moment) -> Moment:
        """The mean of two moments, for what ran between them."""
        reads, products = zip(self.read_gb_s, other.read_gb_s, strict=True), zip(
            self.matmul_gflop_s, other.matmul_gflop_s, strict=True)
        return Moment([mean(pair) for pair in reads], [mean(pair) for pair in products])

    def facts(self) -> dict[str, float | list[float]]:
        return {"read_gb_s": [round(x, 3) for x in self.read_gb_s], "read_total_gb_s": round(sum(self.read_gb_s), 3),
                "matmul_gflop_s": [round(x, 2) for x in self.matmul_gflop_s]}


class Machine:
    """Measures the moment. Every rank must make one, and call `now` together with the others."""

    def __init__(self, world: Group) -> None:
        rows, inner, outer = MATMUL
        self._world = world
        self._buffer = to_device(torch.ones(READ_BYTES // 8, dtype=torch.int64))
        self._left = to_device(torch.ones(rows, inner, dtype=torch.bfloat16))
        self._right = to_device(torch.ones(outer, inner, dtype=torch.bfloat16))

    def now(self) -> Moment:
        """A sum of 64-bit integers does as little beside reading as anything can: on one core it is as fast as a plain
        C loop over the same memory."""
        read = self._rate(lambda: self._buffer.sum(), READ_BYTES)
        product = self._rate(lambda: torch.nn.functional.linear(self._left, self._right), 2 * math.prod(MATMUL))
        rows = everyone(self._world, [read / 1e9, product / 1e9])
        return Moment([row[0] for row in rows], [row[1] for row in rows])

    def _rate(self, work: Callable[[], Tensor], amount: int) -> float:
        """amount of each call, per second of wall time."""
        work()
        get_accelerator().synchronize()
        self._world.barrier()
        calls, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < AT_LEAST_S:
            for _ in range(4):
                work()
            get_accelerator().synchronize()
            calls += 4
        return calls * amount / took


def everyone(world: Group, values: list[float]) -> list[list[float]]:
    """Every rank's values, on every rank."""
    mine = to_device(torch.tensor(values, dtype=torch.float64))
    rows: list[list[float]] = world.all_gather_last(mine, (len(values),) * world.size).view(world.size, -1).tolist()
    return rows


def decode_bytes(plan: Plan, rank: int) -> int:
    """Weights that `rank` reads for a token: the text tower and the head. Of an embedding one row is read, unless it is
    the head too."""
    return sum(elements for module, elements in _weights(plan, rank, all_shapes=True)
               if not _is_vision(plan, module) and (plan.geometry.tied or not _is(plan, module, Vocab))
               ) * DTYPE_BYTES[plan.dtype]


def prefill_flop(plan: Plan, rank: int, tokens: int, patches: int) -> int:
    """Multiplications and additions of `rank`'s linears for a prompt of so many tokens, with pictures of so many
    patches. Of the head only one row is needed."""
    merged = patches // plan.geometry.picture[1] ** 2
    total = 0
    for module, elements in _weights(plan, rank, all_shapes=False):
        tied_head = plan.geometry.tied and _is(plan, module, Vocab)
        if _is(plan, module, Head) or tied_head:
            rows = 1
        elif _is(plan, module, Vocab):
            rows = 0
        elif _is_vision(plan, module):
            rows = merged if "merger" in plan.claims[module].weight else patches
        else:
            rows = tokens
        total += 2 * rows * elements
    return total


def _weights(plan: Plan, rank: int, all_shapes: bool) -> Iterator[tuple[str, int]]:
    """(module, elements that `rank` holds) of every parameter, or only of those that are multiplied by."""
    for module, suffix in plan.parameters():
        shape = plan.slice(module, suffix, rank).local_shape
        if all_shapes or len(shape) > 1:
            yield module, math.prod(shape)


def _is(plan: Plan, module: str, rule: type) -> bool:
    return isinstance(plan.claims[module].rule, rule)


def _is_vision(plan: Plan, module: str) -> bool:
    """The text stack is the first of the geometry; what shares its beginning with another stack is of that tower."""
    roots = {stack.split(".")[0] for stack in plan.geometry.layers if stack != plan.geometry.text_stack}
    return module.split(".")[0] in roots
