"""Write the rows of a job: to stdout in the order of the requests, or to a file that survives a crash.

The file is JSON lines. Rows are appended as their batch is done, in one write, and put into the order of the requests
at the end; started again, a job does what is missing. Only rank 0 has such a thing.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from adapter.config.files import finite
from adapter.config.schema import Config
from adapter.requests import identity
from policies.errors import UserError

log = logging.getLogger("adapter")
Row = dict[str, Any]


class Answers(Protocol):
    """Takes the rows of a job as its batches are done."""

    @property
    def done(self) -> Mapping[str, Row]:
        """Return the rows that a former run left, by id."""

    def add(self, number: int, rows: Sequence[Row]) -> None:
        """Take the rows of a batch; batches are numbered in the order of the requests and may come in any."""

    def finish(self) -> None:
        """End the results; every batch has come."""


class Printed:
    """Passes rows to `write` as soon as those of all requests before them have been."""

    def __init__(self, write: Callable[[Row], None]) -> None:
        self.done: Mapping[str, Row] = {}
        self._write, self._next, self._early = write, 0, dict[int, Sequence[Row]]()

    def add(self, number: int, rows: Sequence[Row]) -> None:
        self._early[number] = rows
        while self._next in self._early:
            for row in self._early.pop(self._next):
                self._write(row)
            self._next += 1

    def finish(self) -> None:
        assert not self._early, "a batch is missing"


class Recorded:
    """Appends rows to the config's `output`, each with a digest of what it depends on; a bar on stderr shows progress.

    Raises UserError where the file cannot be written, another job writes it, or it holds anything but answers to these
    requests.
    """

    def __init__(self, config: Config) -> None:
        assert config.output is not None
        self.path = config.output
        self._asked = identity.digests(config)
        self._file = _open_locked(self.path)
        try:
            rows = list(self._rows())
            self.done: Mapping[str, Row] = {row["id"]: row for _, row in rows}
            self._repair(sum(length for (_, length), _ in rows), len(rows) + 1)
        except UserError:
            os.close(self._file)
            raise
        self._began, self._tokens = time.monotonic(), 0
        if self.done:
            log.info("%s has %d of %d answers already; the others follow", self.path, len(self.done), len(self._asked))
        self._bar = tqdm(disable=True)
        with suppress(OSError, ValueError, AttributeError):  # nobody reads stderr any more, or it was never open
            seen = sys.stderr.isatty()
            self._bar = tqdm(total=len(self._asked), initial=len(self.done), unit="request", file=sys.stderr,
                             dynamic_ncols=seen, mininterval=0.5 if seen else 10.0)

    def add(self, number: int, rows: Sequence[Row]) -> None:
        lines = [json.dumps(finite(row | {"asked": self._asked[row["id"]]}), ensure_ascii=False) for row in rows]
        data = "".join(f"{line}\n" for line in lines).encode(errors="replace")
        try:
            while data:  # a disk that is nearly full takes a part
                data = data[os.write(self._file, data):]
            os.fsync(self._file)
        except OSError as error:
            raise UserError(f"output {self.path}: cannot be written: {error.strerror}; what is in it stays, and the "
                            "same command goes on from there") from None
        self._tokens += sum(row.get("new_tokens", 0) for row in rows)
        with suppress(OSError, ValueError):
            self._bar.set_postfix_str(f"{self._tokens / (time.monotonic() - self._began):.1f} tokens/s", refresh=False)
            self._bar.update(len(rows))

    def finish(self) -> None:
        """Put the file into the order of the requests, unless it is."""
        with suppress(OSError, ValueError):
            self._bar.close()
        positions = {row["id"]: position for position, row in self._rows()}
        order = [positions[name] for name in self._asked]
        try:
            if order != sorted(order):
                _rewrite(self.path, self._file, order)
        except OSError as error:
            log.warning("output %s has every answer, in the order they came: it cannot be put into that of the "
                        "requests (%s)", self.path, error)
        os.close(self._file)

    def _rows(self) -> Iterator[tuple[tuple[int, int], Row]]:
        """((offset, length), row) of every line that has its end. Raises UserError where one answers none of these
        requests, or no request that is still open."""
        seen, offset = set[str](), 0
        with os.fdopen(os.dup(self._file), "rb") as lines:
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    return
                row = self._checked(line, number, seen)
                seen.add(row["id"])
                yield (offset, len(line)), row
                offset += len(line)

    def _checked(self, line: bytes, number: int, seen: Collection[str]) -> Row:
        row = _row(line)
        problem = _problem(row, self._asked, seen)
        if row is None or problem:
            raise UserError(f"output {self.path}: line {number} {problem}; nothing was changed. Name another file, or "
                            "move this one away")
        return row

    def _repair(self, end: int, number: int) -> None:
        """Take away what a crash left of a row: whatever follows `end`, where the last whole line ends.

        Raises UserError where that is no part of an answer, but line `number` of somebody's file.
        """
        line = os.pread(self._file, os.fstat(self._file).st_size - end, end)
        if line:
            if not _is_cut(line, self._asked):
                self._checked(line, number, self.done.keys())
            log.warning("%s: line %d was cut off by a crash and is done again", self.path, number)
            os.ftruncate(self._file, end)


def open_answers(config: Config, write: Callable[[Row], None]) -> Answers:
    """Return where this config's rows go. Raises UserError as `Recorded` does."""
    return Printed(write) if config.output is None else Recorded(config)


def _row(line: bytes) -> Row | None:
    with suppress(ValueError, RecursionError):
        row = json.loads(line)
        if isinstance(row, dict) and {"id", "asked"} <= row.keys() and row.keys() & {"answer", "error"}:
            return row if isinstance(row["id"], str) else None
    return None


def _is_cut(line: bytes, known: Iterable[str]) -> bool:
    """Whether a line without an end may be what a crash left of an answer; of the system, that may be zeros. Otherwise
    it is somebody's file without a newline at its end."""
    with suppress(ValueError, RecursionError):
        json.loads(line)
        return False
    line = line.rstrip(b"\0")
    starts = (json.dumps({"id": name}, ensure_ascii=False).encode()[:-1] for name in known)
    return any(line.startswith(start) or start.startswith(line) for start in starts)


def _problem(row: Row | None, asked: Mapping[str, str], seen: Collection[str]) -> str:
    """What is wrong with a line of the file, in words; empty where it answers one of these requests."""
    if row is None:
        return "is not an answer of this command"
    if row["id"] in seen:
        return f"answers request {row['id']!r} a second time"
    if row["id"] not in asked:
        return f"answers request {row['id']!r}, which the config does not have"
    if row["asked"] == asked[row["id"]]:
        return ""
    version = identity.version_of(row["asked"])
    if version is not None and version != identity.VERSION:
        age = "an older" if version < identity.VERSION else "a newer"
        return (f"was written by {age} version of this program, which compared other things before it took a row; "
                "finish that file with the version that began it")
    return (f"answers another request {row['id']!r} than the config has, or was made with another checkpoint, media "
            "file, or model, weights, processor or generation setting")


def _open_locked(path: Path) -> int:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise UserError(f"output {path}: cannot be written: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UserError(f"output {path}: not a regular file")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file), os.stat(path)):  # its job put another file in its stead meanwhile
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError):
        os.close(file)
        raise UserError(f"output {path}: another job is writing it; wait for it or name another file") from None
    except OSError as error:  # a file system without locks
        log.warning("output %s: cannot be locked (%s); see to it that no other job writes it", path, error.strerror)
    return file


def _rewrite(path: Path, file: int, order: Sequence[tuple[int, int]]) -> None:
    """Replace `file` by its lines at the (offset, length) of `order`, in that order; whole or not at all."""
    path = Path(os.path.realpath(path))  # a link to it stays one
    ordered = path.with_name(path.name + ".ordering")
    with ordered.open("wb") as out:
        os.fchmod(out.fileno(), stat.S_IMODE(os.fstat(file).st_mode))
        for offset, length in order:
            out.write(os.pread(file, length, offset))
        out.flush()
        os.fsync(out.fileno())
    os.replace(ordered, path)
