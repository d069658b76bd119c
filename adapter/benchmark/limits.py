"""What the machine allows at the moment, and how much of it a model must take at least.

A step of decoding reads every text weight once: tokens/s cannot be more than read_gb_s / decode_bytes, and the first
token cannot come before prefill_flop / matmul_gflop_s. The KV cache, collectives and all that is no matrix product are
left out: these are limits, and adapter.planning.cost_model's are predictions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from adapter.parallel.group import Group, exchange, to_device
from adapter.planning.cost_model import Workload, text_work, vision_work
from adapter.planning.plan import Plan

READ_BYTES = 512 << 20  # a rank; beyond any cache
MATMUL = (1024, 1280, 5120)  # rows, in, out: the vision encoder's MLP on an image of 448 x 448
AT_LEAST_S = 0.25  # that each figure is measured for


def rates(world: Group, dtype: torch.dtype) -> list[dict[str, float]]:
    """What each rank gets of the machine while all measure: GB/s that it reads, GFLOP/s of a product in `dtype`.

    A sum of 64-bit integers does as little beside reading as anything can: on one core it is as fast as a plain C loop
    over the same memory. Every rank must call it.
    """
    buffer = to_device(torch.ones(READ_BYTES // 8, dtype=torch.int64))
    return exchange(world, {
        "read_gb_s": _calls_per_second(world, buffer.sum) * READ_BYTES / 1e9,
        "matmul_gflop_s": _calls_per_second(world, product(dtype)) * 2 * math.prod(MATMUL) / 1e9})


def _calls_per_second(world: Group, work: Callable[[], Tensor]) -> float:
    work()
    get_accelerator().synchronize()
    world.barrier()
    calls, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < AT_LEAST_S:
        for _ in range(4):
            work()
        get_accelerator().synchronize()
        calls += 4
    return calls / took


def product(dtype: torch.dtype) -> Callable[[], Tensor]:
    """MATMUL at its fastest: on a CPU whose bfloat16 oneDNN knows, with a weight packed for so many rows before."""
    rows, inner, outer = MATMUL
    left, right = (to_device(torch.ones(n, inner, dtype=dtype)) for n in (rows, outer))
    ops, onednn = torch.ops.mkldnn, torch.backends.mkldnn.is_available() and left.device.type == "cpu"
    if onednn and dtype is torch.bfloat16 and ops._is_mkldnn_bf16_supported():
        packed = ops._reorder_linear_weight(right, rows)
        return lambda: ops._linear_pointwise(left, packed, None, "none", [], "")
    return lambda: torch.nn.functional.linear(left, right)


def decode_bytes(plan: Plan, rank: int) -> int:
    """Weights that `rank` reads for a token: the text encoder and the head, as they are held."""
    return text_work(plan, batch=1, tokens=1, cached=0, rank=rank).weight_bytes


def prefill_flop(plan: Plan, load: Workload, rank: int) -> int:
    """Multiplications and additions of `rank` before the first token, those of attention included. Images are counted
    as for a split encoder: where whole images are assigned to the ranks, the busiest rank has no less."""
    work = text_work(plan, load.batch, load.prompt_tokens, 0, rank) + vision_work(plan.divided, load, rank)
    return work.linear_flop + work.attention_flop
