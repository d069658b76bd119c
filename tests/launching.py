"""Start real ranks, forked or by a real launcher, and make sure that nothing of them is left."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from forking import PRELOAD, Forked, forked, of_every_process

ROOT = Path(__file__).resolve().parents[1]
MARK = "QWENVL_TP_TEST"
SHM_NAME = re.compile(r"/dev/shm/(.+?)(?: \(deleted\))?$", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str
    seconds: float


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(ranks: int, script: Path, args: Sequence[str], launcher: str, port: int, python: str) -> list[str]:
    tail = [str(script), *args]
    return {
        "deepspeed": [python, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--master_port",
                      str(port), *tail],
        "torchrun": [python, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(port),
                     *tail],
        "mpirun": [str(Path(sys.executable).parent / "mpirun"), "--allow-run-as-root", "--oversubscribe", "-n",
                   str(ranks), python, *tail],
        "none": [python, *tail],
    }[launcher]


def spawn(argv: Sequence[str], env: Mapping[str, str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(argv, text=True, start_new_session=True, cwd=cwd, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)


class Running:
    """A running command with all its descendants, found by a mark in their environment; a forked job knows its own.

    `running` lists those that no `finish` has seen end; conftest kills what a failed test leaves in it.
    """

    running: ClassVar[list[Running]] = []

    def __init__(self, argv: Sequence[str], env: Mapping[str, str] | None = None, port: int | None = None,
                 cwd: Path = ROOT, start: Callable[..., subprocess.Popen[str] | Forked] = spawn) -> None:
        self.mark, self.port = uuid.uuid4().hex, port
        self.shm_before = set(os.listdir("/dev/shm"))
        self.began = time.monotonic()
        marked = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", MARK: self.mark, **(env or {})}
        self.process = start(argv, env=marked, cwd=cwd)
        Running.running.append(self)
        self._lines: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._readers = [threading.Thread(target=self._read, args=(name,), daemon=True) for name in self._lines]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str) -> None:
        for line in getattr(self.process, name):
            self._lines[name].append(line)

    def output(self, name: str = "stderr") -> str:
        """What all its processes have written so far."""
        return "".join(self._lines[name])

    def finish(self, timeout: float = 600) -> Outcome:
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill_all()
            ends = f"{self.output('stdout')[-3000:]}\n{self.output()[-5000:]}"
            raise AssertionError(f"no end after {timeout} s\n{ends}") from None
        for reader in self._readers:
            reader.join(10)
        Running.running.remove(self)
        return Outcome(self.process.returncode, self.output("stdout"), self.output(), time.monotonic() - self.began)

    def descendants(self) -> list[int]:
        """Process ids of this job, the launcher included."""
        found = self.process.members() if isinstance(self.process, Forked) else set()
        mark = f"{MARK}={self.mark}".encode()
        return sorted(found | {pid for pid, environment in of_every_process("environ") if mark in environment})

    def rank_pid(self, rank: int) -> int:
        """Process id of one rank, found by RANK in its environment; a forked job has reported it."""
        if isinstance(self.process, Forked):
            return self.process.ranks[rank]
        for pid in self.descendants():
            env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in env and b"LOCAL_RANK" in b"".join(env):
                return pid
        raise AssertionError(f"rank {rank} is not running")

    def kill_all(self) -> None:
        for pid in self.descendants():
            with suppress(ProcessLookupError):  # the one before may have been its parent
                os.kill(pid, signal.SIGKILL)

    def leftovers(self, wait_s: float = 10) -> list[str]:
        """Processes, new /dev/shm names and the known port of this job that are left after `wait_s` at most."""
        deadline = time.monotonic() + wait_s
        while True:
            left = [f"process {pid}" for pid in self.descendants()]
            left += [f"/dev/shm/{name}" for name in unheld(set(os.listdir("/dev/shm")) - self.shm_before)]
            if self.port is not None:
                with socket.socket() as s:
                    if s.connect_ex(("127.0.0.1", self.port)) == 0:
                        left.append(f"port {self.port}")
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.1)


def unheld(names: set[str]) -> list[str]:
    """Those of the names in /dev/shm that no living process has mapped: one that has is another job's."""
    if not names:
        return []
    held = {name for _, maps in of_every_process("maps") for name in SHM_NAME.findall(os.fsdecode(maps))}
    return sorted(names - held)


class Job(Running):
    """Ranks of `script` on this host.

    launcher: one of `command`; or "fork", ranks forked from one process that has imported everything, with the
    variables that the deepspeed launcher sets, or "alone", one such process that no launcher has started. preload: the
    file that imports it.
    """

    def __init__(self, ranks: int, script: Path, *args: str, launcher: str = "fork", python: str = sys.executable,
                 env: Mapping[str, str] | None = None, port: int | None = None, cwd: Path = ROOT,
                 preload: Path = PRELOAD) -> None:
        port = port or free_port()
        if launcher in ("fork", "alone"):
            given = port if launcher == "fork" else None
            start = partial(forked, python=python, preload=preload, ranks=ranks, port=given)
            super().__init__([str(script), *args], env, port, cwd, start)
        else:
            super().__init__(command(ranks, script, args, launcher, port, python), env, port, cwd)


def launch(ranks: int, script: Path, *args: str, timeout: float = 600, **options) -> Outcome:
    """Run a job to its end; fails if it leaves anything behind."""
    job = Job(ranks, script, *args, **options)
    outcome = job.finish(timeout)
    left = job.leftovers()
    assert not left, left
    return outcome
