"""Run a command in a process of its own: its JSON lines, a time limit, and nothing of it left behind.

The doctor and the benchmark start everything through `run`. Only the standard library is imported, since the doctor
also runs where packages are missing or broken.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # a checkout, or the site-packages of an installation
PATIENCE_S = 5.0  # between asking processes to end (SIGTERM) and killing them
SHM = Path("/dev/shm")
SEGMENTS = r"vllm_dist_|__KMP_REGISTERED_LIB_|sm_segment\.|deepspeed_allreduce_buffer_\d+_[\w.]+_{port}_"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
Row = dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """code: None where the time limit ended it. rows: (seconds since its start, JSON object) of each such line on
    stdout. err: the last lines of its stderr."""

    code: int | None
    rows: list[tuple[float, Row]]
    err: list[str]
    limit_s: float

    @property
    def objects(self) -> list[Row]:
        return [row for _, row in self.rows]

    @property
    def how(self) -> str:
        """How it ended, in words, with the line of its stderr that says most."""
        lines = [line.strip() for line in self.err if line.strip()] or ["it wrote nothing to stderr"]
        last = next((line for line in reversed(lines) if re.search(r"(Error|Exception): ", line)), lines[-1])[:300]
        if self.code is None:
            return f"no end after {self.limit_s:.0f} s ({last})"
        if self.code < 0:
            with suppress(ValueError):  # a real-time signal has no name
                return f"died of {signal.Signals(-self.code).name} ({last})"
        return f"exit code {self.code} ({last})"


def launcher(ranks: int, port: int) -> list[str]:
    """DeepSpeed's launcher with so many ranks on this host, as an argv that wants the program behind it."""
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--hostfile", os.devnull,
            "--num_accelerators", str(ranks), "--master_addr", "127.0.0.1", "--master_port", str(port)]


def run(argv: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None,
        echo: Callable[[str], object] | None = None, port: str = "none") -> Ended:
    """Run argv to its end, or for limit_s seconds; then end every process that it started.

    env: variables beside this process's own. echo: called with each line of its stderr. port: where the ranks of the
    job meet, which is in the names of their shared memory; such names that it leaves in /dev/shm are removed. To be
    called from the main thread, since the process gets SIGTERM when the thread that started it ends, and while no other
    thread starts processes, which would be taken for this one's.
    """
    others, names = _children(), segments(port)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what outlives its parent becomes a child of this process, and is found
    process = subprocess.Popen(argv, env={**_environment(), **(env or {})}, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
                               start_new_session=True, preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGTERM))
    output, code = _Output(process, echo), None
    try:
        output.start()
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(limit_s)
    finally:  # also where this process is asked to end
        _end_children(process, others)
        _prctl(PR_SET_CHILD_SUBREAPER, 0)
        remove_unmapped(segments(port) - names)
    output.join()
    return Ended(code, output.rows, list(output.err), limit_s)


class _Output:
    """Two threads that read what a process writes."""

    def __init__(self, process: subprocess.Popen[str], echo: Callable[[str], object] | None) -> None:
        self.rows: list[tuple[float, Row]] = []
        self.err = deque[str](maxlen=200)
        self._began, self._echo = time.perf_counter(), echo
        self._threads = [threading.Thread(target=read, args=(stream,), daemon=True) for read, stream in (
            (self._read_rows, process.stdout), (self._read_errors, process.stderr))]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _read_rows(self, lines: Iterable[str]) -> None:
        for line in lines:
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    self.rows.append((time.perf_counter() - self._began, row))

    def _read_errors(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.err.append(line.rstrip())
            if self._echo:
                self._echo(line.rstrip())


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _environment() -> dict[str, str]:
    """In a checkout a child must find the packages here, behind what PYTHONPATH names, as this process does."""
    if not (ROOT / "pyproject.toml").exists():
        return dict(os.environ)
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    return {**os.environ, "PYTHONPATH": path}


def _end_children(process: subprocess.Popen[str], others: set[int]) -> None:
    """End `process` and every process below this one that is not below `others`: SIGTERM, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + PATIENCE_S
        sent = set[int]()
        while running := _descendants(others):
            if time.monotonic() > deadline:
                break
            for pid in running - sent:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            sent |= running
            time.sleep(0.02)
            process.poll()
            _reap(others | {process.pid})
    process.wait()


def _descendants(besides: set[int]) -> set[int]:
    """Processes below this one that have not ended, without those in `besides` and below them."""
    parents = {pid: parent for pid, (parent, ended) in _processes().items() if not ended}
    found = set[int]()
    new = {pid for pid, parent in parents.items() if parent == os.getpid()} - besides
    while new:
        found |= new
        new = {pid for pid, parent in parents.items() if parent in new}
    return found


def _children() -> set[int]:
    return {pid for pid, (parent, _) in _processes().items() if parent == os.getpid()}


def _reap(besides: set[int]) -> None:
    """Take the exit codes of ended processes that became children of this one, or they would stay as zombies."""
    for pid in _children() - besides:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _processes() -> dict[int, tuple[int, bool]]:
    """Process -> (its parent, whether it has ended) of all that can be seen."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                found[int(entry.name)] = (int(fields[1]), fields[0] in "ZX")
    return found


def segments(port: str) -> set[Path]:
    """Names in /dev/shm as the jobs leave them that meet at `port`, a number or a regular expression."""
    pattern = re.compile(SEGMENTS.format(port=port))
    return {file for file in SHM.iterdir() if pattern.match(file.name)} if SHM.exists() else set()


def remove_unmapped(files: set[Path]) -> None:
    """Remove those files that no process has in its memory; the others belong to another job."""
    for file in files - mapped(files):
        with suppress(OSError):
            file.unlink()


def mapped(files: Collection[Path]) -> set[Path]:
    """Those files that a process has in its memory, of the processes that this one may look at."""
    found = set[Path]()
    for entry in Path("/proc").iterdir() if files else ():
        with suppress(OSError):
            maps = (entry / "maps").read_text(errors="replace")
            found |= {file for file in files if f" {file}\n" in maps}
    return found
