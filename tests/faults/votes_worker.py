"""One rank whose host has no core to spare for it: what it decides of the all-reduce, and whether sums are right.

    deepspeed --num_accelerators 2 votes_worker.py
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from adapter import topology

rank = int(os.environ["RANK"])
topology.usable_cores = lambda: 1 if rank else 8  # as ranks see it whose containers have different quotas
mpu = topology.start(2)
total = mpu.tp.all_reduce(torch.full((4,), rank + 1.0))
os.write(1, (json.dumps({"rank": rank, "fast": mpu.tp.fast, "sum": total.tolist()}) + "\n").encode())
mpu.world.barrier()
