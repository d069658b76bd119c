"""Jobs as processes of their own: their JSON lines and when each came, a limited time, and nothing left of them."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

log = logging.getLogger("adapter")
ROOT = Path(__file__).resolve().parents[2]  # a checkout, or the site-packages of an installation
MARK = "QWENVL_TP_BENCH"  # in the environment of every process of a job
PATIENCE_S = 5.0  # for a process to end when it is asked to, before it is killed
SHM = Path("/dev/shm")
SEGMENTS = r"vllm_dist_|__KMP_REGISTERED_LIB_|deepspeed_allreduce_buffer_\d+_[\w.]+_{port}_"  # what jobs leave there
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Ended:
    """code: None where its time was up; rows: (seconds since its start, JSON object of stdout); said: the end of its
    stderr."""

    code: int | None
    rows: list[tuple[float, dict[str, Any]]]
    said: list[str]
    limit_s: float

    @property
    def failure(self) -> str | None:
        """Why it did not end well, in words."""
        lines = [line for line in self.said if line.strip()] or ["it said nothing"]
        last = next((line for line in reversed(lines) if re.search(r"(Error|Exception): ", line)), lines[-1])
        if self.code is None:
            return f"no end after {self.limit_s:.0f} s ({last})"
        if self.code < 0:
            with suppress(ValueError):
                return f"died of {signal.Signals(-self.code).name} ({last})"
        return f"exit code {self.code} ({last})" if self.code else None


def run(argv: Sequence[str], env: Mapping[str, str], limit_s: float, told: bool, port: str = "none") -> Ended:
    """Run argv to its end, or for limit_s seconds; then end every process that it started. told: whether its stderr is
    this process's too. port: where the job's ranks meet, which is in the names of its shared memory."""
    mark, began, before = uuid.uuid4().hex, time.perf_counter(), _segments(port)
    process = subprocess.Popen(
        argv, env={**_environment(), **env, MARK: mark}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True, preexec_fn=_end_with_parent)
    assert process.stdout is not None and process.stderr is not None
    said, late = deque[str](maxlen=200), threading.Event()
    reader = threading.Thread(target=_follow, args=(process.stderr, said, told), daemon=True)
    timer = threading.Timer(limit_s, _too_late, (late, process.pid, mark))
    reader.start()
    timer.start()
    rows: list[tuple[float, dict[str, Any]]] = []
    try:
        for line in process.stdout:
            rows += [(time.perf_counter() - began, row) for row in _objects(line)]
        process.wait()
    finally:  # also where this process is told to end
        timer.cancel()
        _end(process.pid, mark)
        process.wait()
        _unlink(_segments(port) - before)
    reader.join(PATIENCE_S)
    return Ended(None if late.is_set() else process.returncode, rows, list(said), limit_s)


def _environment() -> dict[str, str]:
    """In a checkout a child must find the packages here, behind what PYTHONPATH names, as this process does."""
    if not (ROOT / "pyproject.toml").exists():
        return dict(os.environ)
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    return {**os.environ, "PYTHONPATH": path}


def _end_with_parent() -> None:
    """In the child, before it becomes another program: SIGTERM when this process is gone, whatever ended it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _follow(stream: IO[str], said: deque[str], told: bool) -> None:
    for line in stream:
        said.append(line.rstrip())
        if told:
            log.info("%s", line.rstrip())


def _too_late(late: threading.Event, session: int, mark: str) -> None:
    late.set()
    _end(session, mark)


def _objects(line: str) -> Iterator[dict[str, Any]]:
    with suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict):
            yield row


def _end(session: int, mark: str) -> None:
    """Every process of the session, or with the mark: torchrun's ranks have sessions of their own, and vLLM's processes
    write over their environment."""
    for stop in (psutil.Process.terminate, psutil.Process.kill):
        family = list(_family(session, mark))
        for member in family:
            with suppress(psutil.Error):
                stop(member)
        psutil.wait_procs(family, PATIENCE_S)


def _family(session: int, mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and (
                    os.getsid(process.pid) == session or process.environ().get(MARK) == mark):
                yield process


def _segments(port: str) -> set[str]:
    pattern = re.compile(SEGMENTS.format(port=port))
    return {name for name in os.listdir(SHM) if pattern.match(name)} if SHM.exists() else set()


def _unlink(new: set[str]) -> None:
    """Names in shared memory that came during the job, but for what a process has mapped: another's job."""
    for name in new - _mapped(new):
        (SHM / name).unlink(missing_ok=True)


def _mapped(names: set[str]) -> set[str]:
    found: set[str] = set()
    for process in psutil.process_iter() if names else ():
        with suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
            found |= {name for name in names if f"{SHM}/{name}" in maps}
    return found


@contextmanager
def memory_file(content: str = "") -> Iterator[str]:
    """A path that children can read and write while this process lives, and that no file system keeps."""
    fd = os.memfd_create("bench")
    try:
        os.write(fd, content.encode())
        yield f"/proc/{os.getpid()}/fd/{fd}"
    finally:
        os.close(fd)
