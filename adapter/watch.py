"""Notice within a second that another rank or the launcher is gone, within seconds that one is late, and say who.

A rank that waits in a collective for a dead one waits for minutes (torch's timeout) or for ever (DeepSpeed's
shared-memory op spins). A thread that looks at the other processes of this host does not. A dead rank or launcher ends
this one. A late one (stopped, stuck, swapped out, or gone to another collective than the others) is a warning first,
since rank 0 may well read films for minutes while the others wait, and ends this one after `topology.TIMEOUT`.

How far the others have come is in memory they share (adapter.progress); what no TensorParallel counts, such as loading
or a DeepSpeed call of the caller's own, is not seen. Ranks of other hosts are neither seen nor named.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import deepspeed.comm as dist
import psutil
import torch
from deepspeed.accelerator import get_accelerator

from adapter.progress import BROADCAST, Standing, open_progress, standing
from adapter.topology import TIMEOUT, TensorParallel

log = logging.getLogger("adapter")
INTERVAL_S = 0.25
LATE_S = 5.0  # a rank that others have waited for so long is named,
AGAIN_S = 60.0  # and once more every so often
LOST = 3  # exit code of a rank that ends because another did


HALTED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_DISK_SLEEP)  # the last: swapped out


@dataclass(frozen=True)
class Peer:
    """Another rank of this host. words: its Progress, None where it cannot be read."""

    pid: int
    words: memoryview | None


@contextmanager
def watching(tp: TensorParallel, limit_s: float = TIMEOUT.total_seconds()) -> Iterator[None]:
    """Within, this process ends (exit code 3, one line on stderr) when a rank of this host or the launcher dies, or
    when another rank has been late at a collective for `limit_s` seconds.

    Every rank must enter it. One rank alone has nobody to wait for and is not watched.
    """
    if tp.size == 1:
        yield
        return
    peers = _peers(tp)
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(tp, peers, _ancestors(), limit_s, stop), daemon=True)
    thread.start()
    try:
        yield
        tp.barrier()
    except Exception:
        time.sleep(3 * INTERVAL_S)  # a lost connection is the echo of a death: let the thread say whose, and end here
        raise
    finally:
        stop.set()
        thread.join()
    dist.barrier()  # nobody leaves while another still watches it


def _peers(tp: TensorParallel) -> Mapping[int, Peer]:
    """The other ranks on this host."""
    fd = -1 if tp.progress is None else tp.progress.file.fileno()
    mine = torch.tensor([hash_of_boot(), os.getpid(), fd]).to(get_accelerator().current_device_name())
    rows = tp.all_gather_last(mine, (3,) * tp.size).view(tp.size, 3).tolist()
    peers = {r: Peer(pid, _words(r, pid, fd)) for r, (host, pid, fd) in enumerate(rows)
             if host == rows[tp.rank][0] and r != tp.rank}
    tp.barrier()  # nobody goes on, and perhaps ends, before the others have looked
    return peers


def _words(rank: int, pid: int, fd: int) -> memoryview | None:
    try:
        return open_progress(pid, fd) if fd >= 0 else None
    except OSError as error:  # /proc mounted with hidepid, or ranks of different users
        log.warning("rank %d (process %d) will not be named if it stalls: its progress cannot be read (%s)", rank, pid,
                    error)
        return None


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


def _watch(tp: TensorParallel, peers: Mapping[int, Peer], links: Mapping[int, int], limit_s: float,
           stop: threading.Event) -> None:
    lateness = Lateness()
    while not stop.wait(INTERVAL_S):
        dead = [r for r, peer in peers.items() if _is_gone(peer.pid)]
        if dead:
            names = ", ".join(f"rank {r} (process {peers[r].pid})" for r in dead)
            _end(f"rank {tp.rank}: {names} died: killed from outside (out of memory? see dmesg) or by an error it "
                 "reported above. This rank cannot go on alone and ends")
        if any(_parent_of(child) != parent for child, parent in links.items()):
            _end(f"rank {tp.rank}: the launcher is gone; this rank ends with it")
        if tp.progress is not None:
            _look_for_late(tp.rank, tp.progress.standing(), peers, lateness, limit_s)


class Lateness:
    """How long this rank has not moved, and when to say so. Seconds in which this process itself was stopped (or its
    machine asleep) do not count: each look counts for two intervals at most."""

    def __init__(self) -> None:
        self._at = Standing(0, False, 0, 0)
        self._looked, self.waited, self._next = time.monotonic(), 0.0, LATE_S

    def look(self, mine: Standing) -> float:
        """Seconds since this rank's standing last changed."""
        now = time.monotonic()
        self.waited += min(now - self._looked, 2 * INTERVAL_S)
        self._looked = now
        if mine != self._at:
            self._at, self.waited, self._next = mine, 0.0, LATE_S
        return self.waited

    def is_time_to_say(self) -> bool:
        if self.waited < self._next:
            return False
        self._next = self.waited + AGAIN_S
        return True


def _look_for_late(rank: int, mine: Standing, peers: Mapping[int, Peer], lateness: Lateness, limit_s: float) -> None:
    """Warn of the ranks this one waits for; after `limit_s`, end."""
    waited = lateness.look(mine)
    if waited < min(LATE_S, limit_s):
        return
    others = {r: standing(peer.words) for r, peer in peers.items() if peer.words is not None}
    states = {r: _state(peers[r].pid) for r in others}
    late = late_ranks(mine, others, states)
    if not late:
        return
    said = describe(mine, others, {r: f"rank {r} (process {peers[r].pid}, {states[r]})" for r in late}, waited)
    if waited >= limit_s:
        _end(f"rank {rank}: {said}. This rank gives up and ends", wake=[peers[r].pid for r in late])
    if lateness.is_time_to_say():
        log.warning("%s", said)


def late_ranks(mine: Standing, others: Mapping[int, Standing], states: Mapping[int, str]) -> list[int]:
    """Which of the other ranks keep this one waiting: the halted and those that are in no collective yet; else those
    in another collective than this rank's; else those still in an earlier one, which may be waiting themselves."""
    awaited = {r: o for r, o in others.items()
               if o.entered < mine.entered or (mine.inside and o.inside and o.entered == mine.entered)}
    stuck = [r for r, o in awaited.items() if states[r] in HALTED or not o.inside]
    astray = [r for r, o in awaited.items() if o.entered == mine.entered and o != mine]
    return stuck or astray or [r for r, o in awaited.items() if o.entered < mine.entered]


def describe(mine: Standing, others: Mapping[int, Standing], names: Mapping[int, str], waited: float) -> str:
    """One sentence about late ranks. names: rank -> how to call it."""
    late = [others[r] for r in names]
    here = f"collective {mine.entered} ({mine.what})"
    who, have = ", ".join(names.values()), "have" if len(names) > 1 else "has"
    if any(o.inside and o.entered == mine.entered and o != mine for o in late):
        there = ", ".join(sorted({o.what for o in late}))
        return (f"{who} {have} been elsewhere for {waited:.0f} s: in {there}, this rank at {here}. The ranks no longer "
                "run the same steps; tensor_parallel.desync_check=1 finds where they part")
    if list(names) == [0] and mine.kind == BROADCAST:
        return f"{who} has been preparing requests, or is late, for {waited:.0f} s at {here}"
    return f"{who} {have} been late for {waited:.0f} s at {here}"


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _state(pid: int) -> str:
    """As psutil words it: running, sleeping, stopped, disk-sleep (swapped out, perhaps)."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return "gone"


def _parent_of(pid: int) -> int | None:
    try:
        return psutil.Process(pid).ppid()
    except psutil.NoSuchProcess:
        return None


def _end(message: str, wake: Iterable[int] = ()) -> None:
    """wake: processes that are to run on if they are stopped, since a stopped one cannot see that the job is over."""
    print(message, file=sys.stderr, flush=True)
    time.sleep(2)  # launchers look about once a second, and the job's exit code should be that of the first to end
    for pid in wake:
        with suppress(OSError):
            os.kill(pid, signal.SIGCONT)
    os._exit(LOST)  # other threads may be inside a collective that never returns
