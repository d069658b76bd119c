"""A rank that only finds out whether a job works. Started by the doctor as a process of its own.

    python -m adapter.doctor.trial    in the environment of a rank of any launcher

It joins the job as the commands do, checks one sum over the ranks in every dtype and size that counts, and reports how
far it came: a JSON line per step and, on rank 0, a last one with what every rank is. stdin: findings of this host's
local rank 0, which rank 0 gets too. A rank that crashes or waits for ever takes this process with it, not the doctor.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from adapter.commands import common
from adapter.doctor.machine import installed, place
from adapter.parallel.launchers import Launch

if TYPE_CHECKING:
    from adapter.parallel.group import Group

STEPS = {"import": "importing torch and DeepSpeed", "environment": "asking the launcher, or MPI, for its place",
         "join": "joining the job", "sum": "summing over the ranks"}
SIZES = (3_000, 870_000)  # bytes: the sums of a token, and of a prompt with an image
SAME = ("torch", "deepspeed", "transformers", "safetensors", "numpy")  # releases that all ranks of a job must share


def main(args: argparse.Namespace, results: common.Results) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # torch then removes the lock of a build
    rank = (place(os.environ) or Launch(0, 1, 0, 1)).rank

    def report(step: str, **more: Any) -> None:
        results.write({"rank": rank, "step": step, **more})

    try:
        _take_part(rank, json.loads(sys.stdin.read() or "[]"), report)
    except Exception as error:
        report("failed", error=f"{type(error).__name__}: {error}"[:1000])
        return common.CHECK_FAILED
    return common.DONE


def _take_part(rank: int, found: list[Any], report: Any) -> None:
    report("import")
    import torch
    from deepspeed.accelerator import get_accelerator

    from adapter.parallel import launchers, parallel_state

    report("environment")
    launch = launchers.read_environment()
    report("join")
    mpu = parallel_state.start(launch.world_size)
    report("sum")
    row = {"rank": rank, "host": socket.gethostname(), "cores": sorted(os.sched_getaffinity(0)),
           "threads": torch.get_num_threads(), "device": str(get_accelerator().current_device_name()),
           "versions": {"python": sys.version.split()[0], **{name: installed(name) for name in SAME}},
           "summing": mpu.summing, "wrong_sums": _wrong_sums(mpu.tp), "found": found}
    rows: list[Any] = [row] * mpu.tp.size
    if mpu.tp.size > 1:
        torch.distributed.all_gather_object(rows, row, group=mpu.tp.group)
    if launch.rank == 0:
        report("done", ranks=rows)


def _wrong_sums(tp: Group) -> list[str]:
    """The sums that came out wrong, in words."""
    import torch
    from deepspeed.accelerator import get_accelerator

    wrong = []
    for dtype in (torch.float32, torch.bfloat16):
        for size in SIZES:
            pattern = torch.arange(size // dtype.itemsize, device=get_accelerator().current_device_name()) % 2 + 1
            total = tp.all_reduce((pattern * (tp.rank % 2 + 1)).to(dtype))  # small numbers: exact in any dtype
            expected = (pattern * sum(rank % 2 + 1 for rank in range(tp.size))).to(dtype)
            if not torch.equal(total, expected):
                wrong.append(f"{size} bytes of {str(dtype).removeprefix('torch.')}")
    return wrong


def start() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    common.run(main, arguments)


if __name__ == "__main__":
    start()
