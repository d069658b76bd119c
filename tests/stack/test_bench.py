"""The benchmark runs, on the demo over two ranks: as ranks of a launcher, and as the process that starts jobs in turn.
No time is asserted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from launching import ROOT, Running, launch

from adapter.kernels import linear

BENCH = ROOT / "launch" / "bench.py"
SMALL = ["--config", str(ROOT / "configs" / "demo_tp4.yaml"), "--new", "4", "--requests-at-once", "2",
         "tensor_parallel.tp_size=2"]
OF_RANKS = {"peak_rss_bytes", "pss_bytes", "read_gb_s", "matmul_gflop_s", "read_share"}
FIGURES = {"load_s", "cold_ttft_s", "ttft_s", "decode_tok_s", "limit_ttft_s", "limit_decode_tok_s"}
COLLECTIVES = {"all_reduce_decode", "all_reduce_prefill"}
pytestmark = pytest.mark.ranks


def rows(outcome) -> tuple[list[dict], dict]:
    found = [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]
    assert found and found[-1]["summary"] is True, outcome.err[-3000:]
    return found[:-1], found[-1]


def ordered(figure: dict) -> bool:
    return set(figure) == {"min", "median", "max"} and 0 < figure["min"] <= figure["median"] <= figure["max"]


def check_ours(found: dict, vision: str = "tensor") -> None:
    assert (found["tp_size"], found["prompt_tokens"], found["new_tokens"]) == (2, 43, 4)
    assert found["all_reduce"] and found["vision"] == vision
    assert all(ordered(found[name]) for name in FIGURES), found
    for name in OF_RANKS:
        assert len(found[name]) == 2 and all(map(ordered, found[name])), (name, found[name])
    assert set(found["collective_us"]) == COLLECTIVES
    assert all(map(ordered, found["collective_us"].values()))
    assert all(ordered(found["at_once"][name]) for name in ("ttft_s", "decode_tok_s"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Ranks that measure themselves: rows, summary, the machine's file."""
    file = tmp_path_factory.mktemp("bench") / "machine.yaml"
    outcome = launch(2, BENCH, *SMALL, "--repeats", "2", "--profile", "tensor_parallel.vision=auto", "--write-hardware",
                     str(file))
    assert outcome.code == 0, outcome.err[-3000:]
    return *rows(outcome), file


@pytest.mark.long
def test_ranks_measure_themselves(measured):
    found, total, file = measured
    assert [row["repeat"] for row in found] == [0, 0, 1] and all(row["engine"] == "ours" for row in found)
    check_ours(total, "auto")
    assert "command_to_first_answer_s" not in total and "peers" not in total
    done = subprocess.run([sys.executable, "launch/plan.py", *SMALL[:2], SMALL[-1], "--hardware", str(file), "--json"],
                          cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["prediction"]["decode_tok_s"] > 0, done.stderr


@pytest.mark.long
def test_both_ways_of_reading_pictures_are_timed_and_operators_are_reported(measured):
    _, total, _ = measured
    seconds, profile = total["vision_s"], total["profile"]
    assert len(seconds) == 4 and not any("1 image" in what for what in seconds)
    for each in seconds.values():
        assert all(map(ordered, each.values()))
        assert each["auto_s"] in (each["tensor_s"], each["data_s"])
    for part in ("first_token_s", "step_s"):
        assert "all others" in profile[part] and 11 <= len(profile[part]) <= 21  # the ten of each of two repeats
        assert all(0 <= spread["min"] < 60 for spread in profile[part].values())
    assert any("qwenvl_tp" in name for name in profile["step_s"])


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    """Ours, a peer, and one that fails, an interpreter that has no vLLM: rows, summary, the picture."""
    file = tmp_path_factory.mktemp("driver") / "a.png"
    job = Running([sys.executable, str(BENCH), *SMALL, "--repeats", "1", "--against", "vllm,hf", "--vllm-python",
                   "/bin/false", "--png", str(file)])
    outcome = job.finish(480)
    assert not job.leftovers()
    assert outcome.code == 1, outcome.err[-3000:]
    return *rows(outcome), file


@pytest.mark.long
def test_the_driver_times_ours_and_a_peer_and_draws_them(driven):
    found, total, picture = driven
    assert [row["engine"] for row in found] == ["ours", "ours", "ours", "vllm", "hf"]
    check_ours(total)
    assert ordered(total["command_to_first_answer_s"])
    peer = total["peers"]["hf"]
    assert peer["prompt_tokens"] == 43
    assert all(ordered(peer[name]) for name in ("start_s", "load_s", "cold_ttft_s", "ttft_s", "decode_tok_s"))
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.long
def test_the_driver_times_other_formats(tmp_path):
    """On one rank: the demo's shards over two do not end between groups, which is reported before anything starts."""
    formats = [sys.executable, str(BENCH), *SMALL, "--repeats", "1", "--formats", "int8"]
    outcome = Running([*formats, "--png", str(tmp_path / "a.png")]).finish(60)
    assert outcome.code == 2 and not outcome.out and "shared by 64" in outcome.err, outcome.err[-3000:]
    assert "repeat" not in outcome.err and "tp sizes that would work: 1\n" in outcome.err, outcome.err
    outcome = Running([*formats, "tensor_parallel.tp_size=1", "--png", str(tmp_path / "a.png")]).finish(480)
    if why := linear.missing():  # int8 needs a processor that has it
        assert outcome.code == 2 and why in outcome.err and "Traceback" not in outcome.err, outcome.err[-3000:]
        return
    assert outcome.code == 0, outcome.err[-3000:]
    found, total = rows(outcome)
    assert [row["engine"] for row in found] == ["ours"] * 3 + ["int8"] * 2
    assert [total["format"], *(peer["format"] for peer in total["peers"].values())] == ["dense", "int8"]
    assert (tmp_path / "a.png").exists()


@pytest.mark.long
def test_a_peer_that_fails_is_a_row_and_costs_the_others_nothing(driven):
    found, total, _ = driven
    failed = found[3]
    assert failed["engine"] == "vllm" and "exit code 1" in failed["error"]
    assert total["peers"]["vllm"]["error"] == failed["error"]


def test_a_request_that_cannot_be_prepared_is_reported_once(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    job = Running([sys.executable, str(BENCH), *SMALL, f"requests=[{{prompt: What?, images: [{tmp_path}/bad.png]}}]"])
    outcome = job.finish(480)
    assert not job.leftovers()
    assert outcome.code == 2 and not outcome.out, outcome.err[-3000:]
    assert outcome.err.count("bad.png") == 1 and "Traceback" not in outcome.err, outcome.err[-3000:]


@pytest.mark.parametrize(("number", "code"), [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
@pytest.mark.long
def test_nothing_is_left_of_a_benchmark_that_is_ended(number, code, tmp_path, monkeypatch):
    """While its ranks run; they are in sessions of their own, so that Ctrl-C reaches the driver alone. Only where it is
    killed, the small directory stays that holds its request."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    job = Running([sys.executable, str(BENCH), *SMALL, "--repeats", "1000", "--new", "64"])
    deadline = time.monotonic() + 120
    while "loaded in" not in job.output():
        assert time.monotonic() < deadline and job.process.poll() is None, job.output()[-3000:]
        time.sleep(0.2)
    os.killpg(job.process.pid, number)
    outcome = job.finish(30)
    left = job.leftovers(30)
    assert not left, left
    assert outcome.code == code and "Traceback" not in outcome.err, outcome.err[-3000:]
    assert number == signal.SIGKILL or not list(tmp_path.glob("qwenvl-tp-bench-*"))
