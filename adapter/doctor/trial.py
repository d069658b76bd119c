"""A rank that only finds out whether a job works. Started by the doctor as a process of its own.

    python -m adapter.doctor.trial    in the environment of a rank of any launcher

It joins the job as the commands do, checks one sum over the ranks in every dtype and size that counts, and reports how
far it came: a JSON line per step, and a last one with what every rank is. A rank that crashes or waits for ever takes
this process with it, not the doctor.
"""

from __future__ import annotations

import signal
import socket
import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from adapter.commands import common
from adapter.doctor.host import installed
from adapter.parallel.cpu import affinity
from adapter.parallel.launchers import environment_rank

if TYPE_CHECKING:
    from adapter.parallel.group import Group

STEPS = {"import": "importing torch and DeepSpeed", "environment": "asking the launcher, or MPI, for its place",
         "join": "joining the job", "sum": "summing over the ranks"}
SIZES = (3_000, 870_000)  # bytes: the sums of a token, and of a prompt with an image


def main(args: Namespace, results: common.Results) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # torch then removes the lock of a build
    rank = environment_rank("RANK")

    def report(step: str, **more: Any) -> None:
        results.write({"rank": rank, "step": step, **more})

    try:
        _take_part(rank, report)
    except Exception as error:
        report("failed", error=f"{type(error).__name__}: {error}"[:1000])
        return common.CHECK_FAILED
    return common.DONE


def _take_part(rank: int, report: Any) -> None:
    report("import")
    import torch

    from adapter.parallel import launchers, parallel_state

    report("environment")
    launch = launchers.read_environment()
    report("join")
    releases = {name: installed(name) or "none" for name in ("transformers", "safetensors", "numpy")}
    mpu = parallel_state.start(launch.world_size, facts={"python": sys.version.split()[0], **releases})
    report("sum")
    row = {"rank": rank, "host": socket.gethostname(), "cores": sorted(affinity()),
           "threads": torch.get_num_threads(), "summing": mpu.summing, "wrong_sums": _wrong_sums(mpu.tp)}
    rows: list[Any] = [row] * mpu.tp.size
    if mpu.tp.size > 1:
        torch.distributed.all_gather_object(rows, row, group=mpu.tp.group)
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


if __name__ == "__main__":
    common.run(main, common.parser(__doc__, config_required=False))
