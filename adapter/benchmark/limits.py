"""What the machine allows at the moment, and how much of it a model must take at least.

A step of decoding reads every text weight once: tokens/s cannot be more than read_gb_s / decode_bytes, and the first
token cannot come before prefill_flop / matmul_gflop_s. The KV cache, collectives and all that is no matrix product are
left out: these are limits, and adapter.planning.cost_model's are predictions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from adapter.parallel.group import Group, to_device
from adapter.planning.cost_model import Workload, text_work, vision_work
from adapter.planning.plan import Plan
from adapter.requests.batching import Clock

READ_BYTES = 512 << 20  # a rank; beyond any cache
MATMUL = (1024, 1280, 5120)  # rows, in, out: the vision encoder's MLP on an image of 448 x 448
AT_LEAST_S = 0.25  # that each figure is measured for
EVERY = 8  # tokens from one look at the machine to the next


class Machine:
    """What this rank gets of the machine at the moment, measured together with the others; every rank must make one."""

    def __init__(self, world: Group, dtype: torch.dtype) -> None:
        """dtype: of the matrix product's operands."""
        self.world = world
        self._buffer = to_device(torch.ones(READ_BYTES // 8, dtype=torch.int64))
        self._product = product(dtype)

    def reads(self) -> float:
        """GB/s. A sum of 64-bit integers does as little beside reading as anything can: on one core it is as fast as a
        plain C loop over the same memory."""
        return self._rate(lambda: self._buffer.sum(), READ_BYTES) / 1e9

    def multiplies(self) -> float:
        """GFLOP/s."""
        return self._rate(self._product, 2 * math.prod(MATMUL)) / 1e9

    def _rate(self, work: Callable[[], Tensor], amount: int) -> float:
        """amount of each call, per second of wall time."""
        work()
        get_accelerator().synchronize()
        self.world.barrier()
        calls, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < AT_LEAST_S:
            for _ in range(4):
                work()
            get_accelerator().synchronize()
            calls += 4
        return calls * amount / took


class Paused(Clock):
    """Times of an answer's tokens by a clock that stands still while the machine is measured: its product before the
    prompt and after it, its reading at the first token, every EVERY tokens, and at the end."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine, self._stood = machine, 0.0
        self._reads, self._products = list[float](), [machine.multiplies()]

    def put(self, value: Tensor) -> None:
        now = time.perf_counter()
        self.times.append(now - self._stood)
        new = len(self.times) - 1  # the first is the prompt
        if new == 1:
            self._products.append(self._machine.multiplies())
        if new % EVERY == 1:
            self._reads.append(self._machine.reads())
            self._machine.world.barrier()  # or a rank that is done first would wait for the others in the next step
        self._stood += time.perf_counter() - now

    def end(self) -> None:
        self._reads.append(self._machine.reads())

    def figures(self) -> dict[str, Any]:
        """GB/s and GFLOP/s of every rank, the means of what it measured, in powers of ten. Every rank must call it."""
        rows = everyone(self._machine.world, [mean(self._reads), mean(self._products)])
        return {"read_gb_s": [round(row[0], 3) for row in rows],
                "read_total_gb_s": round(sum(row[0] for row in rows), 3),
                "matmul_gflop_s": [round(row[1], 2) for row in rows]}


def product(dtype: torch.dtype) -> Callable[[], Tensor]:
    """MATMUL at its fastest: on a CPU whose bfloat16 oneDNN knows, with a weight packed for so many rows before."""
    rows, inner, outer = MATMUL
    left, right = (to_device(torch.ones(n, inner, dtype=dtype)) for n in (rows, outer))
    ops, onednn = torch.ops.mkldnn, torch.backends.mkldnn.is_available() and left.device.type == "cpu"
    if onednn and dtype is torch.bfloat16 and ops._is_mkldnn_bf16_supported():
        packed = ops._reorder_linear_weight(right, rows)
        return lambda: ops._linear_pointwise(left, packed, None, "none", [], "")
    return lambda: torch.nn.functional.linear(left, right)


def everyone(world: Group, values: list[float]) -> list[list[float]]:
    """Every rank's values, on every rank."""
    mine = to_device(torch.tensor(values, dtype=torch.float64))
    rows: list[list[float]] = world.all_gather_last(mine, (len(values),) * world.size).view(world.size, -1).tolist()
    return rows


def decode_bytes(plan: Plan, rank: int) -> int:
    """Weights that `rank` reads for a token: the text encoder and the head, as they are held."""
    return text_work(plan, batch=1, tokens=1, cached=0, rank=rank).weight_bytes


def prefill_flop(plan: Plan, load: Workload, rank: int) -> int:
    """Multiplications and additions of `rank` before the first token, those of attention included. Images are counted
    as for a split encoder: where whole images are assigned to the ranks, the busiest rank has no less."""
    work = text_work(plan, load.batch, load.prompt_tokens, 0, rank) + vision_work(plan.divided, load, rank)
    return work.linear_flop + work.attention_flop
