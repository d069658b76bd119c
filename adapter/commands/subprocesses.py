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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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


def launcher(ranks: int, port: str) -> list[str]:
    """DeepSpeed's launcher with so many ranks on this host, as an argv that wants the program behind it."""
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--hostfile", os.devnull,
            "--num_accelerators", str(ranks), "--master_addr", "127.0.0.1", "--master_port", port]


def run(argv: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None,
        echo: Callable[[str], object] | None = None, port: str = "none") -> Ended:
    """Run argv to its end, or for limit_s seconds; then end every process that it started.

    env: variables beside this process's own. echo: called with each line of its stderr. port: where the ranks of the
    job meet, which is in the names of their shared memory; such names that it leaves in /dev/shm are removed. To be
    called from the main thread, since the process gets SIGTERM when the thread that started it ends, and while no other
    thread starts processes, which would be taken for this one's.
    """
    others, names = set(_below(os.getpid(), set())), segments(port)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what outlives its parent becomes a child of this process, and is found
    process = subprocess.Popen(argv, env={**_environment(), **(env or {})}, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
                               start_new_session=True, preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGTERM))
    rows, err, code = list[tuple[float, Row]](), deque[str](maxlen=200), None
    readers = [threading.Thread(target=_read_rows, args=(process, rows), daemon=True),
               threading.Thread(target=_read_errors, args=(process, err, echo), daemon=True)]
    try:
        for reader in readers:
            reader.start()
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(limit_s)
    finally:  # also where this process is asked to end
        _end_children(process, others)
        _prctl(PR_SET_CHILD_SUBREAPER, 0)
        left = segments(port) - names
        for file in left - mapped(left):  # the others belong to another job
            file.unlink(missing_ok=True)
    for reader in readers:
        reader.join(PATIENCE_S)
    return Ended(code, rows, list(err), limit_s)


def _read_rows(process: subprocess.Popen[str], rows: list[tuple[float, Row]]) -> None:
    began = time.perf_counter()
    for line in process.stdout or ():
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append((time.perf_counter() - began, row))


def _read_errors(process: subprocess.Popen[str], err: deque[str], echo: Callable[[str], object] | None) -> None:
    for line in process.stderr or ():
        err.append(line.rstrip())
        if echo:
            echo(line.rstrip())


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
        deadline, sent = time.monotonic() + PATIENCE_S, set[int]()
        while (running := set(_below(os.getpid(), others))) and time.monotonic() < deadline:
            for pid in running - sent:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            sent |= running
            time.sleep(0.02)
            process.poll()
            for pid in running - {process.pid}:  # one that became a child of this process would stay as a zombie
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
    process.wait()


def _below(pid: int, besides: Collection[int]) -> Iterator[int]:
    """Every process below `pid`, without those in `besides` and below them."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = entry.read_text(errors="replace").rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(entry.parent.name))
    left = [pid]
    while left:
        found = [child for child in children.get(left.pop(), []) if child not in besides]
        yield from found
        left += found


def segments(port: str) -> set[Path]:
    """Names in /dev/shm as the jobs leave them that meet at `port`, a number or a regular expression."""
    pattern = re.compile(SEGMENTS.format(port=port))
    return {file for file in SHM.iterdir() if pattern.match(file.name)} if SHM.exists() else set()


def mapped(files: Collection[Path]) -> set[Path]:
    """Those files that a process has in its memory, of the processes that this one may look at."""
    found = set[Path]()
    for entry in Path("/proc").iterdir() if files else ():
        with suppress(OSError):
            maps = (entry / "maps").read_text(errors="replace")
            found |= {file for file in files if f" {file}\n" in maps}
    return found
