"""An output file that cannot be locked, written or put in order, and a stderr that nobody reads."""

from __future__ import annotations

import errno
import fcntl
import io
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
from output_files import NAMES, complete, config, forked, refused, row, rows

from adapter.requests import results
from adapter.requests.results import Recorded
from policies.errors import UserError


def test_one_job_writes_at_a_time(file):
    locked = multiprocessing.get_context("fork").Event()

    def work():
        recorded = Recorded(config(file))
        locked.set()
        time.sleep(60)
        recorded.finish()

    other = forked(work)
    assert locked.wait(20)
    refused(file, "another job is writing it")
    other.kill()
    other.join()
    assert complete(file) == list(NAMES)
    assert complete(file) == []


def test_a_file_replaced_between_opening_and_locking_is_not_written(file, whole, monkeypatch):
    lock = fcntl.flock

    def late(fd, how):
        file.with_name("ordered").write_bytes(whole)
        os.replace(file.with_name("ordered"), file)
        lock(fd, how)

    monkeypatch.setattr(results.fcntl, "flock", late)
    refused(file, "another job is writing it")


def test_a_file_system_without_locks_is_reported(file, monkeypatch, caplog):
    def refuse(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(results.fcntl, "flock", refuse)
    assert complete(file) == list(NAMES) and "cannot be locked (No locks available)" in caplog.text


def test_places_that_cannot_be_written(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    opened = len(os.listdir("/proc/self/fd"))
    for path, words in [(tmp_path, "Is a directory"), (tmp_path / "none" / "x", "No such file"),
                        (Path("/proc/none"), "No such file"),
                        (tmp_path / "fifo", "not a regular file"), (Path("/dev/full"), "not a regular file"),
                        (tmp_path / "loop", "symbolic links"), (tmp_path / ("x" * 256), "too long")]:
        with pytest.raises(UserError, match=words) as error:
            Recorded(config(path))
        assert str(path) in str(error.value)
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_full_disk_is_a_message_and_what_is_there_stays(file, whole):
    file.unlink()
    recorded = Recorded(config(file))
    recorded.add(0, [row(NAMES[0])])
    before, kept = file.read_bytes(), os.dup(recorded._file)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, recorded._file)
    with pytest.raises(UserError, match=r"No space left on device.*the same command goes on from there") as error:
        recorded.add(1, [row(NAMES[1])])
    assert str(file) in str(error.value) and file.read_bytes() == before
    for fd in (full, kept, recorded._file):
        os.close(fd)
    assert complete(file) == list(NAMES[1:]) and file.read_bytes() == whole


def test_a_disk_that_takes_a_part_of_a_row(file, whole):
    """The system writes up to the limit, and the rest is tried and refused; it must not be taken for written."""
    limit = len(whole) // 2
    file.unlink()

    def work():
        recorded = Recorded(config(file))
        recorded.add(0, [row(NAMES[0])])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(UserError, match="File too large"):
            recorded.add(1, [row(NAMES[1])])

    job = forked(work)
    job.join()
    assert job.exitcode == 0 and file.read_bytes() == whole[:limit]
    assert complete(file) == list(NAMES[1:]) and file.read_bytes() == whole


def test_a_link_stays_a_link_and_a_mode_a_mode(file):
    target = file.parent / "elsewhere" / "target"
    target.parent.mkdir()
    target.touch()
    target.chmod(0o640)
    file.symlink_to(target)
    recorded = Recorded(config(file))
    for number, name in enumerate(reversed(NAMES)):
        recorded.add(number, [row(name)])
    recorded.finish()
    assert file.is_symlink() and [r["id"] for r in rows(target)] == list(NAMES)
    assert target.stat().st_mode & 0o777 == 0o640 and complete(file) == []


def reversed_and_left(file):
    """As a crash before the end leaves it: every row, none in its place."""
    recorded = Recorded(config(file))
    recorded.add(0, [row(name) for name in reversed(NAMES)])
    os.close(recorded._file)
    return file.read_bytes()


def test_a_crash_while_putting_in_order_leaves_the_old_file_whole(file, whole):
    for call in ("pread", "fsync", "replace"):
        file.unlink()
        left = reversed_and_left(file)

        def work(call=call):
            recorded = Recorded(config(file))
            setattr(results.os, call, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
            recorded.finish()

        job = forked(work)
        job.join()
        assert job.exitcode == -signal.SIGKILL and file.read_bytes() == left
        assert file.with_name(file.name + ".ordering").exists()
        assert complete(file) == [] and file.read_bytes() == whole
        assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_where_the_order_cannot_be_made_every_answer_is_there(file, whole, caplog):
    left = file.unlink() or reversed_and_left(file)
    ordering = file.with_name(file.name + ".ordering")
    ordering.mkdir()
    assert complete(file) == [] and file.read_bytes() == left
    assert "has every answer" in caplog.text and "Is a directory" in caplog.text
    ordering.rmdir()
    ordering.write_text("of a crash " * 1000)
    assert complete(file) == [] and file.read_bytes() == whole and not ordering.exists()


def test_in_a_log_there_are_few_lines_and_no_control_sequences(file, capfd):
    complete(file)
    reported = capfd.readouterr()
    assert reported.out == "" and "3/3" in reported.err and "\x1b" not in reported.err and len(reported.err) < 1000


@pytest.mark.parametrize("how", ["closed", "never open", "its reader is gone"])
def test_a_stderr_that_nobody_reads_ends_no_job(file, whole, how):
    file.unlink()

    def work():
        if how == "its reader is gone":
            reader, writer = os.pipe()
            os.close(reader)
            sys.stderr = os.fdopen(writer, "w", 1)
        elif how == "closed":
            sys.stderr = io.StringIO()
            sys.stderr.close()
        else:
            sys.stderr = None
        complete(file)
        os._exit(0)

    job = forked(work)
    job.join()
    assert job.exitcode == 0 and file.read_bytes() == whole


def test_a_stderr_whose_reader_goes_ends_no_job(file, whole):
    file.unlink()

    def work():
        reader, writer = os.pipe()
        sys.stderr = os.fdopen(writer, "w", 1)
        recorded = Recorded(config(file))
        os.close(reader)
        recorded._bar.mininterval = 0
        for number, name in enumerate(NAMES):
            recorded.add(number, [row(name)])
        recorded.finish()
        os._exit(0)

    job = forked(work)
    job.join()
    assert job.exitcode == 0 and file.read_bytes() == whole
