"""Rank 1 cannot sum in some way that rank 0 can: what they decide, and whether sums are right.

    deepspeed --num_accelerators 2 votes_worker.py {cores, bound, build, open, create}
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from adapter.kernels import build
from adapter.parallel import all_reduce, parallel_state, shared_memory


def fail(*_: object) -> None:
    raise OSError("not here")


rank = int(os.environ["RANK"])
if "cores" in sys.argv:
    all_reduce.cpu_quota = lambda: 1.0 if rank else None  # as ranks see it whose containers have different quotas
if "bound" in sys.argv:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
if "build" in sys.argv and rank == 1:
    build.unavailable = lambda: "no compiler here"
if "open" in sys.argv and rank == 1:  # a sandbox, or /proc of another pid namespace
    shared_memory.os = type("os", (), {"open": fail, "getpid": os.getpid, "O_RDWR": 0, "O_NONBLOCK": 0, "O_CLOEXEC": 0})
if "create" in sys.argv and rank == 0:
    os.memfd_create = fail
mpu = parallel_state.start(2)
total = mpu.tp.all_reduce(torch.full((4,), rank + 1.0))
row = {"rank": rank, "route": mpu.tp.route.name, "summing": mpu.summing, "sum": total.tolist()}
os.write(1, (json.dumps(row) + "\n").encode())
mpu.world.barrier()
