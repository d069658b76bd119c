"""Sums and gathers through the shared memory of each replica, against sums in float64; or a rank that dies in one.

    deepspeed --num_accelerators N sum_worker.py TP_SIZE [killed]

A JSON line per rank: per dtype and size the worst error as a share of its bound, and a digest of the bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from adapter.parallel import parallel_state, shared_memory
from adapter.parallel.group import Group, Route

RANK, TP_SIZE = int(os.environ["RANK"]), int(next(a for a in sys.argv[1:] if a.isdecimal()))
SIZES = (1, 3, 4096, 16411, 100003, 1200001)  # values: of both ways to sum, and of several pieces


def values(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * size + rank)).to(dtype)


def share_of_bound(total: torch.Tensor, parts: list[torch.Tensor]) -> float:
    """Each addition in float32 errs by 2^-24 of what is summed so far at most, and rounding the result once by half
    its eps, or half its smallest subnormal."""
    exact, sizes = sum(p.double() for p in parts), sum(p.double().abs() for p in parts)
    info = torch.finfo(total.dtype)
    summing = (len(parts) - 1) * 2.0**-24 * (1 + 1e-6) * sizes
    rounding = info.eps / 2 * (exact.abs() + summing + info.smallest_normal)
    if total.dtype == torch.float32:
        rounding = 0 * rounding
    return float(((total.double() - exact).abs() / (summing + rounding)).max())


def sums(tp: Group, ranks: list[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"errors": {}, "digests": {}}
    for dtype in shared_memory.DTYPES:
        for size in SIZES:
            parts = [values(rank, size, dtype) for rank in ranks]
            total = tp.all_reduce(parts[tp.rank].clone())
            key = f"{size} {dtype}"
            found["errors"][key] = share_of_bound(total, parts)
            found["digests"][key] = hashlib.sha256(total.view(torch.uint8).numpy().tobytes()).hexdigest()
    strided = torch.arange(12.0).view(3, 4).t()
    found["strided"] = torch.equal(tp.all_reduce(strided), strided * tp.size)
    found["int64"] = tp.all_reduce(torch.tensor([2**40 + 1])).tolist() == [(2**40 + 1) * tp.size]
    widths = tuple(range(5, 5 + tp.size))
    gathered = tp.all_gather_last(torch.full((2, widths[tp.rank]), float(RANK), dtype=torch.bfloat16), widths)
    expected = torch.cat([torch.full((2, n), float(r)) for r, n in zip(ranks, widths, strict=True)], 1)
    found["gathered"] = torch.equal(gathered.float(), expected)
    big = [values(rank, 700001, torch.float32) for rank in ranks]
    found["gathered big"] = torch.equal(tp.all_gather_last(big[tp.rank], (700001,) * tp.size), torch.cat(big))
    for turn in range(300):  # small and large ones in turns: a buffer used again too early would show
        size = (3, 4096, 40000, 1)[turn % 4]
        total = tp.all_reduce(torch.full((size,), float(turn + tp.rank)))
        assert bool((total == turn * tp.size + sum(range(tp.size))).all()), turn
    return found


def killed(tp: Group) -> dict[str, Any]:
    """Rank 1 dies between two sums; the launcher ends the others then, which is not what is tested."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tp.all_reduce(torch.ones(8))
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            tp.all_reduce(torch.ones(100000))
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}


mpu = parallel_state.start(TP_SIZE)
ranks = torch.distributed.get_process_group_ranks(mpu.tp.group)
region = shared_memory.join(mpu.world, mpu.tp.rank, ranks, parallel_state.TIMEOUT.total_seconds())
assert not isinstance(region, str), region
tp = replace(mpu.tp, route=Route(shared_memory.NAME, region.all_reduce, region.all_gather))
row = killed(tp) if "killed" in sys.argv else sums(tp, ranks)
os.write(1, (json.dumps({"rank": RANK, "pid": os.getpid(), "summing": mpu.summing, **row}) + "\n").encode())
if "killed" in sys.argv:
    os._exit(1)
mpu.world.barrier()
