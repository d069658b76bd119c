"""Notice within a second that another rank or the launcher is gone, say who, and end.

A rank that waits in a collective for a dead one waits for minutes (torch's timeout) or for ever (DeepSpeed's
shared-memory op spins). A thread that looks at the other processes of this host does not.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import deepspeed.comm as dist
import psutil
import torch
from deepspeed.accelerator import get_accelerator

from adapter.topology import TensorParallel

INTERVAL_S = 0.25
LOST = 3  # exit code of a rank that ends because another did


@contextmanager
def watching(tp: TensorParallel) -> Iterator[None]:
    """Within, this process ends (exit code 3, one line on stderr) when a rank of this host or the launcher dies.

    Every rank must enter it. One rank alone has nobody to wait for and is not watched.
    """
    if tp.size == 1:
        yield
        return
    peers = _local_pids(tp)
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(tp.rank, peers, _ancestors(), stop), daemon=True)
    thread.start()
    try:
        yield
        dist.barrier()
    except Exception:
        time.sleep(3 * INTERVAL_S)  # a lost connection is the echo of a death: let the thread say whose, and end here
        raise
    finally:
        stop.set()
        thread.join()
    dist.barrier()  # nobody leaves while another still watches it


def _local_pids(tp: TensorParallel) -> Mapping[int, int]:
    """Rank -> process id of the other ranks on this host."""
    host = hash_of_boot()
    mine = torch.tensor([host, os.getpid()]).to(get_accelerator().current_device_name())
    rows = tp.all_gather_last(mine, (2,) * tp.size).view(tp.size, 2).tolist()
    return {r: pid for r, (where, pid) in enumerate(rows) if where == host and r != tp.rank}


def hash_of_boot() -> int:
    """A number that only processes of the same running host and pid namespace share."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return (int(file.read().replace("-", "")[:8], 16) << 31) ^ os.stat("/proc/self/ns/pid").st_ino


def _ancestors() -> Mapping[int, int]:
    """Process -> its parent now; a change means that the parent died. The deepspeed command starts its launcher as a
    child and does not end it when it is killed itself, so that link is watched too."""
    links = {os.getpid(): os.getppid()}
    try:
        parent = psutil.Process(os.getppid())
        if "deepspeed.launcher.launch" in " ".join(parent.cmdline()):
            links[parent.pid] = parent.ppid()
    except psutil.Error:  # the parent is outside this pid namespace or not ours to look at
        return {}
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
    time.sleep(2)  # launchers look about once a second, and the job's exit code should be that of the first to end
    os._exit(LOST)  # other threads may be inside a collective that never returns
