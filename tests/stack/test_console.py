"""`qwenvl-tp COMMAND`: help of a screen, ranks that it starts itself, exit codes, signals, and a launcher around it.

Run from the checkout as `python -m adapter`; test_wheel.py runs the installed script.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, Outcome, Running, launch

COMMANDS = ["plan", "generate", "verify", "shard", "bench", "doctor"]
DEMO = ROOT / "launch" / "demo" / "checkpoint"


def run(*args: str, seconds: float = 600, **env: str) -> Outcome:
    job = Running([sys.executable, "-m", "adapter", *args], env)
    outcome = job.finish(seconds)
    assert not (left := job.leftovers()), left
    return outcome


def rows(outcome: Outcome) -> list[dict]:
    return [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]


@pytest.fixture
def config(tmp_path) -> str:
    file = tmp_path / "c.yaml"
    file.write_text(f"model: {{path: {DEMO}, dtype: float32}}\ntensor_parallel: {{tp_size: 2}}\n"
                    "requests: [{prompt: 'What colour is the shape?', expected: nothing like it}]\n")
    return str(file)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen(command):
    outcome = run(command, "--help", COLUMNS="100")
    lines = outcome.out.rstrip().splitlines()
    assert outcome.code == 0 and lines[0].startswith(f"usage: qwenvl-tp {command}")
    assert len(lines) <= 40 and f"qwenvl-tp {command}" in "\n".join(lines[1:]), outcome.out


def test_without_a_command_it_names_them():
    for args in ([], ["--help"]):
        outcome = run(*args)
        assert outcome.code == 0 and all(f"qwenvl-tp {command}" in outcome.out for command in COMMANDS)
    outcome = run("genrate", "--config", "c.yaml")
    assert outcome.code == 2 and "'genrate'" in outcome.err and "generate" in outcome.err


@pytest.mark.parametrize(("args", "words"), [
    (["tensor_parallel.tp_size=29"], ["tp_size 29", "tp sizes that would work"]),
    (["tensor_parallel.tpsize=2"], ["tpsize", "did you mean 'tp_size'"]),
    (["--ranks", "3"], ["--ranks 3", "multiple of tensor_parallel.tp_size = 2"]),
    (["--ranks=0"], ["--ranks 0"]),
    (["model.path=./gone"], ["no such directory"]),
])  # fmt: skip
def test_bad_input_is_reported_once_and_starts_nothing(config, args, words):
    outcome = run("generate", "--config", config, *args)
    assert outcome.code == 2 and not outcome.out and outcome.err.startswith("error: "), outcome
    assert all(word in outcome.err for word in words) and "DeepSpeed" not in outcome.err, outcome.err


@pytest.mark.ranks
@pytest.mark.long
def test_it_starts_replicas_and_passes_on_the_exit_code(config):
    outcome = run("generate", "--config", config, "tensor_parallel.tp_size=1", "--ranks", "2")
    assert outcome.code == 1, outcome.err[-3000:]  # the answer differs from `expected`
    assert [row.get("summary", False) for row in rows(outcome)] == [False, True]
    assert (rows(outcome)[-1]["tp_size"], rows(outcome)[-1]["replicas"]) == (1, 2)


@pytest.mark.ranks
@pytest.mark.long
def test_under_a_launcher_it_is_a_rank(config):
    outcome = launch(2, Path("--module"), "adapter", "generate", "--config", config, launcher="deepspeed")
    assert outcome.code == 1, outcome.err[-3000:]
    assert rows(outcome)[-1]["tp_size"] == 2


@pytest.mark.ranks
@pytest.mark.long
@pytest.mark.parametrize(("number", "foreground"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_ends_all_of_it(config, tmp_path, number, foreground):
    """Ctrl-C reaches the whole foreground group; SIGTERM, as of `timeout`, only the command itself."""
    output, requests = tmp_path / "answers.jsonl", tmp_path / "r.jsonl"
    requests.write_text('{"prompt": "What colour is the shape?"}\n' * 9999)
    job = Running([sys.executable, "-m", "adapter", "generate", "--config", config, f"requests={requests}",
                   f"output={output}", "batch_size=1"])
    until = time.monotonic() + 200
    while time.monotonic() < until and not (output.exists() and output.stat().st_size):
        time.sleep(0.1)
    assert len(job.descendants()) >= 4, job.output()  # this command, DeepSpeed's launcher, two ranks
    (os.killpg if foreground else os.kill)(job.process.pid, number)
    assert job.finish(60).code == 128 + number
    assert not (left := job.leftovers()), left


def test_a_signal_before_the_ranks_are_there_starts_none(config):
    job = Running([sys.executable, "-c", "import sys, adapter.__main__ as m, deepspeed.launcher.runner, os, signal\n"
                   "def early(*_): os.kill(os.getpid(), signal.SIGTERM)\n"
                   "m.network.free_port = early\nm.start()",
                   "generate", "--config", config])
    assert job.finish(100).code == 143, job.output()
    assert "spawned" not in job.output("stdout") + job.output() and not job.leftovers()
