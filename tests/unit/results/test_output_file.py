"""Rows to stdout in order, or to a file: every crash, and every file that is not ours."""

from __future__ import annotations

import json
import os
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from output_files import DEMO, NAMES, complete, config, forked, refused, row, rows

from adapter.config.load import from_dict
from adapter.requests.results import Printed, Recorded, open_answers


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


def test_what_was_cut_off_is_reported(file, whole, caplog):
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


def test_ten_thousand_rows(file):
    names = [str(n) for n in range(10_000)]
    recorded = Recorded(config(file, names))
    recorded.add(0, [row(name) for name in reversed(names[:9_999])])
    os.close(recorded._file)
    assert complete(file, names) == ["9999"]
    assert [r["id"] for r in rows(file)] == names
