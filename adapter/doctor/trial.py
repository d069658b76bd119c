"""A rank of a job that only finds out whether such a job works. Started by adapter.doctor as a process of its own.

    python -m adapter.doctor.trial [--limit SECONDS]    in the environment of a rank of any launcher

Joins the job as the commands do, sums over the ranks in every way they sum, checks the sums, and tells how far it came:
a JSON line per step, and on rank 0 a last one with what every rank is. stdin: rows that local rank 0 found on its host,
which rank 0 gets. A rank that crashes or waits for ever takes this process with it, not the doctor.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import signal
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter.commands import common
from adapter.doctor.machine import installed, place, span
from adapter.parallel.launchers import Launch

if TYPE_CHECKING:
    from adapter.parallel.group import Group

STEPS = {"import": "importing torch and DeepSpeed", "environment": "asking the launcher, or MPI, for its place",
         "join": "joining the job", "sum": "summing over the ranks"}
SMALL, LARGE = 3_000, 870_000  # bytes: the sums of a token, and of a prompt with a picture
REPEATS = 20
SAME = ("torch", "deepspeed", "transformers", "safetensors", "numpy")  # versions that ranks of one job must share


def main(args: argparse.Namespace, results: common.Results) -> int:
    faulthandler.dump_traceback_later(args.limit, exit=True)  # a rank whose doctor is gone ends too
    here = place(os.environ) or Launch(0, 1, 0, 1)

    def say(step: str, **more: Any) -> None:
        results.write({"rank": here.rank, "step": step, **more})

    def leave(*_: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, leave)
    try:
        _take_part(here, json.loads(sys.stdin.read() or "[]"), say)
    except SystemExit:
        os._exit(143)
    except Exception as error:
        say("failed", error=f"{type(error).__name__}: {error}"[:1000])
        _unlink_mpi_segments()
        return common.CHECK_FAILED
    return common.DONE


def _take_part(here: Launch, found: list[Any], say: Any) -> None:
    heard = _Heard()
    logging.getLogger("adapter").addHandler(heard)
    began = time.perf_counter()
    say("import")
    from adapter.health.watchdog import watching
    from adapter.parallel import launchers, parallel_state

    say("environment")
    launch = launchers.read_environment()
    at = "_".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    say("join", segment=f"deepspeed_allreduce_buffer_{os.getuid()}_{at}")
    mpu = parallel_state.start(launch.world_size)
    tp = mpu.tp
    joined = time.perf_counter() - began
    say("sum")
    with watching(mpu):  # warns where the ranks cannot see each other
        sums = _sums(tp)
    rows = _gathered({**_self(here, heard), "found": found, "sums": sums, "summing": mpu.summing}, tp)
    if launch.rank == 0:
        say("done", joined_s=round(joined, 2), ranks=rows)


def _unlink_mpi_segments() -> None:
    """Open MPI's names in /dev/shm: a process that is alone in its MPI leaves them, even after MPI_Finalize."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for name in {line.split()[-1] for line in maps if "/dev/shm/sm_segment." in line}:
            Path(name).unlink(missing_ok=True)


class _Heard(logging.Handler):
    """Keeps what our modules warn of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def _self(here: Launch, heard: _Heard) -> dict[str, Any]:
    import torch
    from deepspeed.accelerator import get_accelerator

    return {"rank": here.rank, "host": socket.gethostname(), "process": os.getpid(),
            "cores": span(os.sched_getaffinity(0)), "core_list": sorted(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(), "device": str(get_accelerator().current_device_name()),
            "python": ".".join(map(str, sys.version_info[:3])),
            "versions": {name: installed(name) for name in SAME}, "warnings": heard.said}


def _gathered(row: dict[str, Any], tp: Group) -> list[dict[str, Any]]:
    import torch

    rows: list[Any] = [row] * tp.size
    if tp.size > 1:
        torch.distributed.all_gather_object(rows, row, group=tp.group)
    return rows


def _sums(tp: Group) -> dict[str, Any]:
    """wrong: what did not add up, in words; microseconds: the middle of some repeats."""
    import torch
    from deepspeed.accelerator import get_accelerator

    device, wrong, took = get_accelerator().current_device_name(), [], {}
    for dtype in (torch.float32, torch.bfloat16):
        for size in (SMALL, LARGE):
            pattern = torch.arange(size // dtype.itemsize, device=device) % 2 + 1  # small numbers: exact in any dtype
            total = tp.all_reduce((pattern * (tp.rank % 2 + 1)).to(dtype))
            expected = (pattern * sum(rank % 2 + 1 for rank in range(tp.size))).to(dtype)
            if not torch.equal(total, expected):
                wrong.append(f"{size} bytes of {str(dtype).removeprefix('torch.')}")
    for size in (SMALL, LARGE) if tp.size > 1 else ():
        x = torch.zeros(size // 4, device=device)
        took[size] = round(statistics.median(_microseconds(tp, x) for _ in range(REPEATS)))
    return {"wrong": wrong, "microseconds": took}


def _microseconds(tp: Group, x: Any) -> float:
    from deepspeed.accelerator import get_accelerator

    began = time.perf_counter()
    tp.all_reduce(x)
    get_accelerator().synchronize()
    return (time.perf_counter() - began) * 1e6


def start() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--limit", type=float, default=300.0)
    arguments.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    common.run(main, arguments)


if __name__ == "__main__":
    start()
