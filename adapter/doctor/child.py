"""A process that answers in JSON lines, for a limited time, and of which nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # a checkout, or the site-packages of an installation
PATIENCE_S = 5.0  # for a process to end when it is asked to, before it is killed


@dataclass(frozen=True)
class Ended:
    """code: None where its time was up; negative: the signal that ended it."""

    code: int | None
    rows: list[dict[str, Any]]
    err: str
    seconds: float

    @property
    def how(self) -> str:
        """In words, with the last it said."""
        said = next((line for line in reversed(self.err.splitlines()) if line.strip()), "")
        if self.code is None:
            return f"no end after {self.seconds:.0f} s"
        if self.code < 0:
            with suppress(ValueError):
                return f"died of {signal.Signals(-self.code).name}" + (f" ({said[:300]})" if said else "")
        return f"exit code {self.code}" + (f" ({said[:300]})" if said else "")


def python(*argv: str) -> list[str]:
    return [sys.executable, *argv]


def run(argv: Sequence[str], limit_s: float, stdin: str = "") -> Ended:
    """Run argv to its end, or for limit_s seconds; then end it and every process it started (its process group)."""
    began = time.monotonic()
    process = subprocess.Popen(argv, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True)
    code, out, err = None, "", ""
    try:
        out, err = process.communicate(stdin, timeout=limit_s)
        code = process.returncode
    except subprocess.TimeoutExpired:
        pass
    finally:  # also where this process is told to end
        _end(process)
    if code is None:
        with suppress(subprocess.TimeoutExpired):  # its pipes may be held by a process that left the group
            out, err = process.communicate(timeout=PATIENCE_S)
    return Ended(code, _rows(out), err, time.monotonic() - began)


def _environment() -> dict[str, str]:
    """In a checkout a child must find the packages here, behind what PYTHONPATH names, as this process does."""
    if not (ROOT / "pyproject.toml").exists():
        return dict(os.environ)
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _end(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):  # asked first: torch then removes the lock of a build
        deadline = time.monotonic() + PATIENCE_S
        try:
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:  # nobody is left
            return


def _rows(out: str) -> list[dict[str, Any]]:
    rows = []
    for line in out.splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows
