"""Notice within a second that another rank or the launcher is gone, say who, and end.

A rank that waits in a collective for a dead one waits for minutes (torch's timeout) or for ever (DeepSpeed's
shared-memory op spins). A thread that looks at the other processes of this host does not.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import deepspeed.comm as dist
import psutil
import torch

from adapter.topology import TensorParallel

INTERVAL_S = 0.25
LOST = 3  # exit code of a rank that ends because another did


@contextmanager
def watching(tp: TensorParallel) -> Iterator[None]:
    """Within, this process ends (exit code 3, one line on stderr) when a rank of this host or the launcher dies."""
    peers = _local_pids(tp)
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(tp.rank, peers, _ancestors(), stop), daemon=True)
    thread.start()
    try:
        yield
        if tp.size > 1:
            dist.barrier()  # nobody may leave while another still watches it
    finally:
        stop.set()
        thread.join()


def _local_pids(tp: TensorParallel) -> Mapping[int, int]:
    """Rank -> process id of the other ranks on this host."""
    if tp.size == 1:
        return {}
    host = hash_of_boot()
    mine = torch.tensor([host, os.getpid()])
    if torch.distributed.get_backend() != "gloo":
        mine = mine.to(torch.device("cuda"))
    rows = tp.all_gather_last(mine, (2,) * tp.size).view(tp.size, 2).tolist()
    return {r: pid for r, (where, pid) in enumerate(rows) if where == host and r != tp.rank}


def hash_of_boot() -> int:
    """A number that only processes of the same running host and pid namespace share."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return (int(file.read().replace("-", "")[:8], 16) << 31) ^ os.stat("/proc/self/ns/pid").st_ino


def _ancestors() -> Mapping[int, int]:
    """Process -> its parent now; a change means that the parent died. The deepspeed command starts its launcher as a
    child and does not end it when it is killed itself, so that link is watched too."""
    parent = psutil.Process(os.getppid())
    links = {os.getpid(): parent.pid}
    if "deepspeed.launcher.launch" in " ".join(parent.cmdline()):
        links[parent.pid] = parent.ppid()
    return links


def _watch(rank: int, peers: Mapping[int, int], links: Mapping[int, int], stop: threading.Event) -> None:
    while not stop.wait(INTERVAL_S):
        dead = [r for r, pid in peers.items() if _is_gone(pid)]
        if dead:
            names = ", ".join(f"rank {r} (process {peers[r]})" for r in dead)
            _end(f"rank {rank}: {names} died: killed from outside (out of memory? see dmesg) or by an error it "
                 "reported above. This rank cannot go on alone and ends")
        if any(_parent_of(child) != parent for child, parent in links.items()):
            _end(f"rank {rank}: the launcher is gone; this rank ends with it")


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _parent_of(pid: int) -> int | None:
    try:
        return psutil.Process(pid).ppid()
    except psutil.NoSuchProcess:
        return None


def _end(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(LOST)  # other threads may be inside a collective that never returns
