"""Ranks forked from one process that has imported everything (fork_server.py); here is who asks it for them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

HERE = Path(__file__).resolve().parent
PRELOAD = HERE / "preload.py"
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK",
             "MASTER_ADDR", "MASTER_PORT")


class Server:
    """A fork server: `python` with what `preload` imports."""

    running: ClassVar[list[Server]] = []

    def __init__(self, python: str, preload: Path) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {k: v for k, v in os.environ.items() if k not in OF_A_RANK} | {"OMP_NUM_THREADS": "1"}
        with theirs:
            self.process = subprocess.Popen(
                [python, HERE / "fork_server.py", str(theirs.fileno()), preload], env=environment, cwd=HERE.parent,
                stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=[theirs.fileno()])
        Server.running.append(self)

    def fork(self, job: Mapping[str, object]) -> Forked:
        """Start a job; see fork_server.py for what it says."""
        ends = [os.pipe() for _ in range(3)]
        try:
            socket.send_fds(self.control, [json.dumps(job).encode()], [write for _, write in ends])
        finally:
            for _, write in ends:
                os.close(write)
        return Forked(*(os.fdopen(read, encoding="utf-8", errors="replace") for read, _ in ends))

    def stop(self) -> None:
        """End it, and with it whatever job of it still runs."""
        Server.running.remove(self)
        self.control.close()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()


@cache
def server(python: str = sys.executable, preload: Path = PRELOAD) -> Server:
    """The one server of this kind, started when first asked for."""
    return Server(python, preload)


def stop_servers() -> None:
    for one in list(Server.running):
        one.stop()
    server.cache_clear()


class Forked:
    """A forked job, in the words of subprocess.Popen. ranks: their process ids."""

    def __init__(self, stdout, stderr, report) -> None:
        self.stdout, self.stderr = stdout, stderr
        self.returncode: int | None = None
        first = report.readline()
        assert first, "the fork server has ended: what it printed is above"
        started = json.loads(first)
        self.pid, self.ranks = started["pid"], started["ranks"]
        self._ended = threading.Event()
        threading.Thread(target=self._follow, args=(report,), daemon=True).start()

    def _follow(self, report) -> None:
        with report:
            reported = report.readline()
        self.returncode = json.loads(reported)["code"] if reported else -9  # killed, it says nothing
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("a forked job", timeout)
        return self.returncode

    def members(self) -> set[int]:
        """Living processes of the job: of its session, or begun by one of them. When its ranks have ended, its own
        process, which waits for those that they have left, is none."""
        living = processes()
        found = {pid for pid, (_, session) in living.items() if self.pid in (pid, session)}
        while more := {pid for pid, (parent, _) in living.items() if parent in found} - found:
            found |= more
        return found if self.returncode is None else found - {self.pid}


def of_every_process(name: str) -> Iterator[tuple[int, bytes]]:
    """(process id, the content of its /proc/PID/`name`) of all that can be read. Jobs are looked through thousands of
    times: pathlib would take three times as long."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
                yield int(pid), file.read()
        except OSError:
            pass


def processes() -> dict[int, tuple[int, int]]:
    """Parent and session of every process that has not ended."""
    found = {}
    for pid, line in of_every_process("stat"):
        state, parent, _, session = line.rpartition(b")")[2].split()[:4]
        if state not in b"ZX":
            found[pid] = int(parent), int(session)
    return found


def forked(argv: Sequence[str], env: Mapping[str, str], cwd: Path, python: str, preload: Path, ranks: int,
           port: int | None) -> Forked:
    """argv: a script and its arguments, run by ranks as the deepspeed launcher's; port None: by one process that no
    launcher has started."""
    if port is not None:
        env = {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return server(python, preload).fork({"ranks": ranks, "script": str(argv[0]), "args": list(argv[1:]),
                                         "env": dict(env), "cwd": str(cwd), "launched": port is not None})
