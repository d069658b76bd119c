"""Rows to stdout in order, or to a file: every crash, every file that is not ours, every way a disk refuses."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import ROOT
from tqdm import tqdm

from adapter.config.load import from_dict
from adapter.requests import results as answers
from adapter.requests.results import Printed, Recorded, open_answers
from policies.errors import UserError

DEMO = ROOT / "launch" / "demo" / "checkpoint"
NAMES = ("first", "zweite ü", "第三")


def config(output, names=NAMES, **sections):
    requests = sections.pop("requests", [{"id": name, "prompt": f"What is {name}?"} for name in names])
    return from_dict({"model": {"path": str(DEMO)}, "requests": requests, "output": str(output), **sections})


def row(name, **more):
    return {"id": name, "answer": f"→ {name} 🟦", "new_tokens": 2, **more}


def complete(path, names=NAMES, **sections):
    """Do what is missing; returns which were."""
    recorded = Recorded(config(path, names, **sections))
    missing = [name for name in names if name not in recorded.done]
    recorded.add(0, [row(name) for name in missing])
    recorded.finish()
    return missing


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(path, words, **sections):
    before = path.read_bytes()
    with pytest.raises(UserError, match=words) as error:
        Recorded(config(path, **sections))
    assert str(path) in str(error.value) and path.read_bytes() == before


@pytest.fixture
def file(tmp_path):
    return tmp_path / "answers.jsonl"


@pytest.fixture
def whole(file):
    """The file of a job that nothing disturbed."""
    complete(file)
    return file.read_bytes()


def forked(function):
    """A process of its own that does it and then nothing else. tqdm's lock is one that processes share: one that is
    killed would keep it from the others."""
    def work():
        tqdm.set_lock(threading.RLock())
        function()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@settings(deadline=None)
@given(st.permutations(range(6)))
def test_printed_rows_come_in_the_order_of_the_requests(order):
    written: list = []
    printed = Printed(written.append)
    for done, number in enumerate(order, start=1):
        printed.add(number, [{"id": f"{number}a"}, {"id": f"{number}b"}])
        ready = next(n for n in range(7) if n not in order[:done])
        assert [r["id"] for r in written] == [f"{n}{x}" for n in range(ready) for x in "ab"]
    printed.finish()


def test_a_missing_batch_is_a_bug():
    printed = Printed(lambda row: None)
    printed.add(1, [row("b")])
    with pytest.raises(AssertionError):
        printed.finish()


def test_output_chooses(file):
    assert isinstance(open_answers(config(file), lambda row: None), Recorded)
    without = from_dict({"model": {"path": str(DEMO)}})
    assert isinstance(open_answers(without, lambda row: None), Printed)


def test_rows_are_in_the_file_as_they_come_and_in_order_at_the_end(file):
    recorded = Recorded(config(file))
    assert recorded.done == {} and file.read_bytes() == b""
    recorded.add(1, [row(NAMES[2]), row(NAMES[1])])
    assert [r["id"] for r in rows(file)] == [NAMES[2], NAMES[1]]
    recorded.add(0, [row(NAMES[0])])
    assert [r["id"] for r in rows(file)] == [NAMES[2], NAMES[1], NAMES[0]]
    recorded.finish()
    assert [{k: v for k, v in r.items() if k != "asked"} for r in rows(file)] == [row(name) for name in NAMES]
    assert "→ 第三 🟦" in file.read_text(), "text is not escaped"
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_file_in_order_is_not_written_again(file, whole):
    number = file.stat().st_ino
    assert complete(file) == [] and file.stat().st_ino == number


def test_a_crash_at_any_byte_loses_no_whole_row_and_repeats_none(file, whole):
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        assert complete(file) == list(NAMES[kept:]), cut
        assert file.read_bytes() == whole, cut


@pytest.mark.parametrize("tail", [b"\0" * 300, b'{"id": "\0\0\0', b'{"id": "first"' + b"\0" * 9])
def test_zeros_that_a_crash_of_the_system_left(file, whole, tail):
    for kept in range(3):
        file.write_bytes(b"".join(whole.splitlines(keepends=True)[:kept]) + tail)
        assert len(complete(file)) == 3 - kept and file.read_bytes() == whole


def test_what_was_cut_off_is_said(file, whole, caplog):
    file.write_bytes(whole[:-5])
    complete(file)
    assert "line 3 was cut off by a crash" in caplog.text


def test_a_killed_job_goes_on(file):
    """Killed at random moments until it is done; ids come back to front, so that the end has to put them in order."""
    names = [str(n) for n in range(400)]

    def work():
        recorded = Recorded(config(file, names))
        for number, name in enumerate(n for n in reversed(names) if n not in recorded.done):
            recorded.add(number, [row(name)])
            time.sleep(0.001)

    size, choice = 0, random.Random(5)
    for _ in range(8):
        job = forked(work)
        while job.is_alive() and (not file.exists() or file.stat().st_size <= size):
            time.sleep(0.001)
        time.sleep(choice.uniform(0, 0.02))
        job.kill()
        job.join()
        before = file.read_bytes()
        size = before.rfind(b"\n") + 1
        recorded = Recorded(config(file, names))
        assert file.read_bytes() == before[:size] and set(recorded.done) == {r["id"] for r in rows(file)}
        os.close(recorded._file)
    complete(file, names)
    assert [r["id"] for r in rows(file)] == names
    undisturbed = file.with_name("undisturbed.jsonl")
    complete(undisturbed, names)
    assert file.read_bytes() == undisturbed.read_bytes()


FOREIGN = {
    "text": (b"hello\n", "line 2 is not an answer"),
    "no text": (b"\xff\xfe\x00\n", "line 2 is not an answer"),
    "empty": (b"\n", "line 2 is not an answer"),
    "list": (b"[1]\n", "line 2 is not an answer"),
    "number": (b"1" * 5000 + b"\n", "line 2 is not an answer"),
    "deep": (b"[" * 100_000 + b"\n", "line 2 is not an answer"),
    "no id": (b'{"asked": "x", "answer": ""}\n', "line 2 is not an answer"),
    "no digest": (b'{"id": "first", "answer": ""}\n', "line 2 is not an answer"),
    "no answer": (b'{"id": "first", "asked": "x"}\n', "line 2 is not an answer"),
    "id is a list": (b'{"id": ["first"], "asked": "x", "answer": ""}\n', "line 2 is not an answer"),
    "id is a mapping": (b'{"id": {}, "asked": "x", "answer": ""}\n', "line 2 is not an answer"),
    "id is a number": (b'{"id": 1, "asked": "x", "answer": ""}\n', "line 2 is not an answer"),
    "another id": (b'{"id": "other", "asked": "x", "answer": ""}\n', "line 2 answers request 'other', which"),
    "another digest": ('{"id": "第三", "asked": "x", "error": ""}\n'.encode(), "line 2 answers another request"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_lines_are_refused_and_stay(file, whole, kind):
    line, words = FOREIGN[kind]
    first, second, _ = whole.splitlines(keepends=True)
    file.write_bytes(first + line + second[:20])
    refused(file, words)
    file.write_bytes(whole)
    complete(file)  # and nothing is left locked


def test_the_same_id_twice_is_refused(file, whole):
    file.write_bytes(whole + whole.splitlines(keepends=True)[0])
    refused(file, "line 4 answers request 'first' a second time")
    file.write_bytes(whole + whole.splitlines()[0])
    refused(file, "line 4 answers request 'first' a second time")


@pytest.mark.parametrize("content", [
    b"hello", b"\xff\xd8\xff\xe0 a picture", b'{"model": {"path": "x"}}', b'[{"id": "first"}]', b"prompt: x\nid: 1",
    b'{"id": "first", "prompt": "What is first?"}', b'{"id": "other", "ask', b'{"id": "firs"',
])
def test_another_file_without_a_newline_at_its_end_is_not_taken_for_a_cut_off_answer(file, content):
    file.write_bytes(content)
    refused(file, "line 1 is not an answer")


@pytest.mark.parametrize("changed", [
    {"requests": [{"id": n, "prompt": "What else?"} for n in NAMES]},
    {"requests": [{"id": n, "prompt": f"What is {n}?", "max_pixels": 3136} for n in NAMES]},
    {"requests": [{"id": n, "prompt": f"What is {n}?", "images": ["one.png"]} for n in NAMES]},
    {"generation": {"max_new_tokens": 5}},
    {"processor": {"fps": 1.0}},
    {"model": {"path": str(DEMO), "dtype": "float32"}},
])
def test_what_the_answers_depend_on_must_be_the_same(file, whole, changed):
    refused(file, "line 1 answers another request 'first'", **changed)
    file.write_bytes(whole.splitlines()[0])  # an answer, and not one that a crash cut off
    refused(file, "line 1 answers another request 'first'", **changed)


@pytest.mark.parametrize("changed", [
    {"requests": [{"id": n, "prompt": f"What is {n}?", "expected": "blue"} for n in NAMES]},
    {"tensor_parallel": {"tp_size": 2}}, {"batch_size": 1}, {"deepspeed": {"enable_cuda_graph": False}},
])
def test_what_they_do_not_depend_on_may_change(file, whole, changed):
    file.write_bytes(whole[:-3])
    assert complete(file, **changed) == [NAMES[2]]
    assert file.read_bytes() == whole


def test_requests_may_be_in_another_order_and_more(file, whole):
    names = [NAMES[2], "new", NAMES[0], NAMES[1]]
    assert complete(file, names) == ["new"]
    assert [r["id"] for r in rows(file)] == names
    refused(file, "line 2 answers request 'new', which the config does not have")


def test_the_same_settings_said_in_another_order_are_the_same(file):
    complete(file, generation={"max_new_tokens": 5, "do_sample": True})
    assert complete(file, generation={"do_sample": True, "max_new_tokens": 5}) == []


def test_what_yaml_has_and_json_has_not_in_the_settings(file):
    complete(file, generation={"assistant_early_exit": b"1"})
    assert complete(file, generation={"assistant_early_exit": b"1"}) == []
    refused(file, "answers another request", generation={"assistant_early_exit": b"2"})


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

    monkeypatch.setattr(answers.fcntl, "flock", late)
    refused(file, "another job is writing it")


def test_a_file_system_without_locks_is_said(file, monkeypatch, caplog):
    def refuse(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(answers.fcntl, "flock", refuse)
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


def test_failed_rows_are_kept_and_not_tried_again(file):
    recorded = Recorded(config(file))
    recorded.add(0, [row(NAMES[0]), {"id": NAMES[1], "error": "no such picture"}])
    os.close(recorded._file)
    recorded = Recorded(config(file))
    assert set(recorded.done) == set(NAMES[:2]) and recorded.done[NAMES[1]]["error"] == "no such picture"
    os.close(recorded._file)
    assert complete(file) == [NAMES[2]]


def test_what_json_has_no_word_for(file):
    recorded = Recorded(config(file))
    recorded.add(0, [row(NAMES[0], ttft_s=float("nan"), scores=[float("-inf"), 1.5], error="a\u2028b\nc\r\0")])
    recorded.add(1, [row(NAMES[1]), {"id": NAMES[2], "error": "no such file: /\udcff.png"}])
    recorded.finish()
    first, _, third = (json.loads(line, parse_constant=pytest.fail) for line in file.read_bytes().splitlines())
    assert first["ttft_s"] == "nan" and first["scores"] == ["-inf", 1.5] and first["error"] == "a\u2028b\nc\r\0"
    assert third["error"] == "no such file: /?.png"
    assert complete(file) == []


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
            setattr(answers.os, call, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
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


def test_ten_thousand_rows(file):
    names = [str(n) for n in range(10_000)]
    recorded = Recorded(config(file, names))
    recorded.add(0, [row(name) for name in reversed(names[:9_999])])
    os.close(recorded._file)
    assert complete(file, names) == ["9999"]
    assert [r["id"] for r in rows(file)] == names


def test_in_a_log_there_are_few_lines_and_no_control_sequences(file, capfd):
    complete(file)
    said = capfd.readouterr()
    assert said.out == "" and "3/3" in said.err and "\x1b" not in said.err and len(said.err) < 1000


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
