"""A thread that notices within a second that another rank or the launcher is gone, within seconds that a rank is late,
and that another host is silent, and reports which.

A rank that waits in a collective for a dead one waits for minutes (torch's timeout) or for ever (DeepSpeed's
shared-memory op busy-waits). This thread looks at the other processes of this host and hears those of other hosts
(adapter.health.heartbeat). A dead rank, launcher or host ends this rank. A late one (stopped, stuck, swapped out, or in
another collective than the others) is a warning first, since a first rank may well read videos for minutes while the
others wait, and ends this rank after `rendezvous.TIMEOUT`.

How far the others have come is in memory they share (adapter.parallel.progress) or in their datagrams. What no Group
counts, such as loading or a DeepSpeed call of the caller's own, is not seen; nor are replays of a CUDA graph. On
accelerators the counts are of what is enqueued: a rank whose process is late is reported, a collective that hangs on
the device is not. NCCL's own watchdog ends that one after the same time, and its flight recorder
(TORCH_NCCL_TRACE_BUFFER_SIZE) names it.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import psutil
import torch
from deepspeed.accelerator import get_accelerator

from adapter.health.heartbeat import HEARTBEAT_S, Hosts, meet
from adapter.parallel.group import exchange
from adapter.parallel.parallel_state import Mpu
from adapter.parallel.progress import BROADCAST, CollectiveState, hash_of_boot, open_progress, read_state
from adapter.parallel.rendezvous import TIMEOUT
from policies.errors import CheckFailed, UserError

log = logging.getLogger("adapter")
INTERVAL_S = 0.25
LATE_S = 5.0  # a rank that others have waited for so long is reported,
AGAIN_S = 60.0  # and again every so often
ECHO_S = 9.0  # a lost connection is reported by the host that lost it within so long
LOST = 3  # exit code of a rank that ends because another did
NOTHING = CollectiveState(0, False, 0, 0)  # the state of a rank that counts no collectives
FLIGHT_RECORDER = ("Devices run behind what is enqueued, so the collective that is stuck may be an earlier one: NCCL's "
                   "flight recorder (TORCH_NCCL_TRACE_BUFFER_SIZE=2000, TORCH_NCCL_DUMP_ON_TIMEOUT=1) names it")
HALTED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_DISK_SLEEP)  # the last: swapped out


@dataclass(frozen=True)
class Peer:
    """Another rank of this host. words: its Progress, None where it cannot be read."""

    pid: int
    words: memoryview | None


@contextmanager
def watching(mpu: Mpu, limit_s: float = TIMEOUT.total_seconds(), heartbeat_s: float = HEARTBEAT_S) -> Iterator[None]:
    """Within, this process ends (exit code 3, one line on stderr) when a rank of this host, the launcher or another
    host dies, another host is silent for `heartbeat_s` seconds (0: however long), or another rank of its replica has
    been late at a collective for `limit_s` seconds.

    Every rank must enter it. One rank alone has nobody to wait for and is not watched.
    """
    if mpu.world.size == 1:
        yield
        return
    watcher = _watcher(mpu, limit_s, heartbeat_s)
    watcher.start()
    try:
        with watcher.hearing_sigterm(), watcher.reporting_failures():
            yield
            mpu.world.barrier()
    finally:
        watcher.end()
    dist.barrier()  # nobody leaves while another still watches it


def _watcher(mpu: Mpu, limit_s: float, heartbeat_s: float) -> Watcher:
    """Every rank must call it."""
    world, progress, name = mpu.world, mpu.world.progress, socket.gethostname()
    fd = -1 if progress is None else progress.file.fileno()
    ranks = exchange(world, {"host": hash_of_boot(), "name": name, "pid": os.getpid(), "fd": fd})
    here = ranks[world.rank]["host"]
    peers = {r: Peer(facts["pid"], _words(r, facts["pid"], facts["fd"])) for r, facts in enumerate(ranks)
             if facts["host"] == here and r != world.rank}
    names = _distinct(ranks)
    hosts = meet(world, names, names[world.rank], heartbeat_s) if len(set(names)) > 1 else None
    world.barrier()  # nobody goes on, and perhaps ends, before the others have looked
    return Watcher(mpu, peers, hosts, limit_s)


def _distinct(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each rank's host by name; hosts that have one name (containers, say) get their first rank to it."""
    hosts_of: dict[str, list[int]] = {}  # name -> its hosts, each once
    first: dict[int, int] = {}
    for rank, facts in enumerate(ranks):
        if facts["host"] not in first:
            first[facts["host"]] = rank
            hosts_of.setdefault(facts["name"], []).append(facts["host"])
    return [facts["name"] if len(hosts_of[facts["name"]]) == 1 else f"{facts['name']} of rank {first[facts['host']]}"
            for facts in ranks]


def _words(rank: int, pid: int, fd: int) -> memoryview | None:
    try:
        return open_progress(pid, fd) if fd >= 0 else None
    except OSError as error:  # /proc mounted with hidepid, or ranks of different users
        log.warning("rank %d (process %d) will not be named if it stalls: its progress cannot be read (%s)", rank, pid,
                    error)
        return None


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


class Watcher(threading.Thread):
    """The thread that looks. peers: the other ranks of this host; hosts: those of others, if there are any.

    on_device: whether ranks only enqueue their collectives.
    """

    def __init__(self, mpu: Mpu, peers: Mapping[int, Peer], hosts: Hosts | None, limit_s: float) -> None:
        super().__init__(daemon=True)
        self.rank, self.root, self.progress = mpu.world.rank, mpu.tp.root, mpu.world.progress
        self.mates = set(torch.distributed.get_process_group_ranks(mpu.tp.group))
        self.peers, self.hosts, self.limit_s = peers, hosts, limit_s
        self.on_device = get_accelerator().device_name() != "cpu"
        self._links, self._lateness, self._over = _ancestors(), Lateness(), threading.Event()
        self._heard, self._bell = os.pipe()
        os.set_blocking(self._bell, False)

    @contextmanager
    def hearing_sigterm(self) -> Iterator[None]:
        """Within, a SIGTERM goes to this thread, whatever the main one is stuck in: launchers end all ranks as soon as
        they see one dead, and the others are to report which it was. It does nothing outside the main thread, since
        Python allows it there only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        fd = signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(fd)
            signal.signal(signal.SIGTERM, before)

    def run(self) -> None:
        while not self._over.is_set():
            if select.select([self._heard], [], [], INTERVAL_S)[0] and signal.SIGTERM in os.read(self._heard, 64):
                self._look_for_dead()
                os._exit(128 + signal.SIGTERM)
            self._look_for_dead()
            mine = NOTHING if self.progress is None else self.progress.state()
            if self.hosts is not None and (gone := self.hosts.look(mine)):
                self._end(f"{gone}. This rank cannot go on alone and ends")
            if self.progress is not None:
                self._look_for_late(mine)

    def end(self) -> None:
        self._over.set()
        with suppress(OSError):
            os.write(self._bell, b"\0")
        self.join()
        os.close(self._heard)
        os.close(self._bell)
        if self.hosts is not None:
            self.hosts.close()

    @contextmanager
    def reporting_failures(self) -> Iterator[None]:
        """Within, an error of this rank alone is sent to the other hosts.

        A lost connection is the echo of another's death: first the thread has time to report that one, and end here.
        """
        try:
            yield
        except (CheckFailed, UserError):  # raised on every rank
            raise
        except BaseException as error:
            if isinstance(error, Exception):
                echo = self.hosts is not None and isinstance(error, RuntimeError)
                time.sleep(ECHO_S if echo else 3 * INTERVAL_S)
            if self.hosts is not None:
                self.hosts.farewell(f"rank {self.rank} failed: {type(error).__name__}: {error}")
            raise

    def _look_for_dead(self) -> None:
        dead = [r for r, peer in self.peers.items() if _is_gone(peer.pid)]
        if dead:
            names = ", ".join(f"rank {r} (process {self.peers[r].pid})" for r in dead)
            self._end(f"{names} died: killed from outside (out of memory? see dmesg) or by an error it reported above. "
                      "This rank cannot go on alone and ends")
        if any(_parent_of(child) != parent for child, parent in self._links.items()):
            self._end("the launcher is gone; this rank ends with it")

    def _look_for_late(self, mine: CollectiveState) -> None:
        """Warn of the ranks this one waits for; after `limit_s`, end."""
        waited = self._lateness.look(mine)
        if waited < min(LATE_S, self.limit_s):
            return
        others = {r: read_state(p.words) for r, p in self.peers.items() if r in self.mates and p.words is not None}
        states = {r: _state(self.peers[r].pid) for r in others}
        names = {r: f"process {self.peers[r].pid}, {states[r]}" for r in others}
        for r, distant in self.hosts.distant.items() if self.hosts else ():
            if r in self.mates and distant.state is not None:
                others[r], states[r], names[r] = distant.state, "", f"host {distant.host}"
        late = late_ranks(mine, others, states)
        if not late:
            return
        report = describe(mine, others, {r: f"rank {r} ({names[r]})" for r in late}, waited, self.root, self.on_device)
        if waited >= self.limit_s:
            wake = [self.peers[r].pid for r in late if r in self.peers]
            self._end(f"{report}. This rank gives up and ends", wake)
        if self._lateness.is_report_due():
            log.warning("%s", report)

    def _end(self, message: str, wake: Iterable[int] = ()) -> None:
        """wake: processes that are to run on if they are stopped; a stopped one cannot see that the job is over."""
        with suppress(OSError, ValueError):  # nobody reads stderr any more: end nevertheless
            print(f"rank {self.rank}: {message}", file=sys.stderr, flush=True)
        if self.hosts is not None:
            self.hosts.farewell(f"rank {self.rank}: {message}")
        time.sleep(2)  # launchers look about once a second, and the job's exit code should be that of the first to end
        for pid in wake:
            with suppress(OSError):
                os.kill(pid, signal.SIGCONT)
        os._exit(LOST)  # other threads may be inside a collective that never returns


class Lateness:
    """How long this rank has not moved, and when to report it. Seconds in which this process itself was stopped (or its
    machine asleep) do not count: each look counts for two intervals at most."""

    def __init__(self) -> None:
        self._at = NOTHING
        self._looked, self.waited, self._next = time.monotonic(), 0.0, LATE_S

    def look(self, mine: CollectiveState) -> float:
        """Seconds since this rank's state last changed."""
        now = time.monotonic()
        self.waited += min(now - self._looked, 2 * INTERVAL_S)
        self._looked = now
        if mine != self._at:
            self._at, self.waited, self._next = mine, 0.0, LATE_S
        return self.waited

    def is_report_due(self) -> bool:
        if self.waited < self._next:
            return False
        self._next = self.waited + AGAIN_S
        return True


def late_ranks(mine: CollectiveState, others: Mapping[int, CollectiveState], states: Mapping[int, str]) -> list[int]:
    """Which of the other ranks keep this one waiting: the halted and those that are in no collective yet; else those
    in another collective than this rank's; else those still in an earlier one, which may be waiting themselves."""
    awaited = {r: o for r, o in others.items()
               if o.entered < mine.entered or (mine.inside and o.inside and o.entered == mine.entered)}
    stuck = [r for r, o in awaited.items() if states[r] in HALTED or not o.inside]
    astray = [r for r, o in awaited.items() if o.entered == mine.entered and o != mine]
    return stuck or astray or [r for r, o in awaited.items() if o.entered < mine.entered]


def describe(mine: CollectiveState, others: Mapping[int, CollectiveState], names: Mapping[int, str], waited: float,
             root: int = 0, on_device: bool = False) -> str:
    """One sentence about late ranks, and a second one where ranks only enqueue their collectives (on_device).

    names: rank -> how to call it; root: the rank that prepares requests.
    """
    sentence = _late_in_words(mine, others, names, waited, root, "enqueued collective" if on_device else "collective")
    return f"{sentence}. {FLIGHT_RECORDER}" if on_device else sentence


def _late_in_words(mine: CollectiveState, others: Mapping[int, CollectiveState], names: Mapping[int, str],
                   waited: float, root: int, noun: str) -> str:
    late = [others[r] for r in names]
    here = f"{noun} {mine.entered} ({mine.what})"
    who, have = ", ".join(names.values()), "have" if len(names) > 1 else "has"
    if any(o.inside and o.entered == mine.entered and o != mine for o in late):
        there = ", ".join(sorted({o.what for o in late}))
        return (f"{who} {have} been elsewhere for {waited:.0f} s: in {there}, this rank at {here}. The ranks no longer "
                "run the same steps; tensor_parallel.desync_check=1 finds where they part")
    if list(names) == [root] and mine.kind == BROADCAST:
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
