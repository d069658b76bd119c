"""Jobs that write a file: killed and started again, they answer every request once; failures are rows."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from launching import ROOT, Job, launch

GENERATE = ROOT / "launch" / "generate.py"
DEMO = ROOT / "launch" / "demo"
pytestmark = pytest.mark.ranks


def job(tmp_path: Path, count: int, new_tokens: int) -> Path:
    """A config of `count` requests, of which every tenth fails, and whose answers have so many tokens."""
    picture = str(DEMO / "pictures" / "01-colour.png")
    rows = [{"id": f"r{i}", "prompt": f"What colour is shape {i}?", "images": [picture if i % 10 != 3 else "gone.png"]}
            for i in range(count)]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "job.yaml"
    file.write_text(
        f"model: {{path: {DEMO / 'checkpoint'}, dtype: float32}}\ntensor_parallel: {{tp_size: 1}}\n"
        f"generation: {{max_new_tokens: {new_tokens}, min_new_tokens: {new_tokens}, do_sample: false}}\n"
        "requests: requests.jsonl\noutput: answers.jsonl\nbatch_size: 2\n")
    return file


def lines(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]


def test_killed_and_started_again_every_request_is_answered_once_and_in_order(tmp_path):
    config, count = str(job(tmp_path, 60, 24)), 60
    running = Job(2, GENERATE, "--config", config)
    deadline = time.monotonic() + 180
    while not (tmp_path / "answers.jsonl").exists() or len((tmp_path / "answers.jsonl").read_bytes().split(b"\n")) < 9:
        assert time.monotonic() < deadline and running.process.poll() is None, running.output()[-3000:]
        time.sleep(0.02)
    for rank in (0, 1):
        os.kill(running.rank_pid(rank), signal.SIGKILL)
    assert running.finish(60).code != 0 and not running.leftovers()

    with (tmp_path / "answers.jsonl").open("ab") as file:
        file.write(b'{"id": "r59", "answer": "cut o')
    before = (tmp_path / "answers.jsonl").read_bytes().split(b"\n")[:-1]
    assert 8 <= len(before) < count, "killed in the middle"

    outcome = launch(2, GENERATE, "--config", config)
    assert outcome.code == 2, outcome.err[-3000:]  # some requests failed
    rows = lines(tmp_path)
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(count)], "each once, in order"
    assert set(before) <= set((tmp_path / "answers.jsonl").read_bytes().split(b"\n")), "what was done is done again"
    assert {row["id"] for row in rows if "error" in row} == {f"r{i}" for i in range(3, count, 10)}
    assert all("gone.png" in row["error"] for row in rows if "error" in row)
    printed = [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]
    assert len(printed) == 1 and printed[0]["summary"] and printed[0]["replicas"] == 2
    assert printed[0]["resumed"] == len(before)
    assert printed[0]["answered"] == 54 and printed[0]["failed"] == 6
    assert "cut off by a crash" in outcome.err and "60/60" in outcome.err, outcome.err[-2000:]  # the bar

    done = (tmp_path / "answers.jsonl").read_bytes()
    again = launch(1, GENERATE, "--config", config, launcher="alone")
    assert again.code == 2 and (tmp_path / "answers.jsonl").read_bytes() == done
    assert json.loads(again.out.splitlines()[-1])["resumed"] == count


def test_an_output_of_other_requests_is_refused_before_anything_is_loaded(tmp_path):
    config = str(job(tmp_path, 3, 2))
    (tmp_path / "answers.jsonl").write_text('{"id": "r0", "answer": "x", "asked": "0123456789abcdef"}\n')
    outcome = launch(2, GENERATE, "--config", config)
    assert outcome.code == 2 and "answers.jsonl: line 1" in outcome.err and "Traceback" not in outcome.err
    assert "self-test" not in outcome.err
    assert lines(tmp_path) == [{"id": "r0", "answer": "x", "asked": "0123456789abcdef"}]
