"""What can go wrong ends within seconds, non-zero, with a message a person can act on, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from checkpoints import Shape, make_checkpoint
from launching import ROOT, Job, free_port, launch

GENERATE = ROOT / "launch" / "generate.py"
DEMO = ROOT / "launch" / "demo" / "checkpoint"
pytestmark = pytest.mark.ranks


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def config(directory: Path, model: Path, text: str = "") -> str:
    file = directory / "config.yaml"
    file.write_text(f"model: {{path: {model}, dtype: float32}}\ntensor_parallel: {{tp_size: 2}}\n"
                    f"requests: [{{prompt: 'What colour is the shape?'}}]\n{text}")
    return str(file)


def refused(outcome, *words: str) -> None:
    """Exit code 2, every word on stderr, one error message, and no traceback."""
    assert outcome.code == 2, (outcome.code, outcome.err[-3000:])
    for word in words:
        assert word in outcome.err, (word, outcome.err[-3000:])
    assert "Traceback" not in outcome.err, outcome.err[-3000:]
    assert sum(line.startswith("error") for line in outcome.err.splitlines()) == 1, outcome.err[-3000:]
    assert not [line for line in outcome.out.splitlines() if line.startswith("{")], outcome.out


def test_bad_yaml_key(tmp_path, model):
    outcome = launch(2, GENERATE, "--config", config(tmp_path, model, "tensor_paralel: {tp_size: 2}\n"),
                     launcher="deepspeed")
    refused(outcome, "tensor_paralel", "tensor_parallel", "config.yaml")
    assert outcome.err.count("tensor_paralel") == 1, "one rank of a host says it"


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_bad_key_under_other_launchers(tmp_path, model, launcher):
    outcome = launch(2, GENERATE, "--config", config(tmp_path, model, "sampling: {}\n"), launcher=launcher)
    assert outcome.code != 0 and "sampling" in outcome.err  # torchrun and mpirun have exit codes of their own


@pytest.mark.parametrize("tp_size, words", [
    (29, ["tp_size 29", "28", "tp sizes that would work"]),
    (3, ["this job has 2 ranks", "tp_size is 3", "--num_accelerators 3"]),
])
def test_bad_tp_size(tmp_path, model, tp_size, words):
    outcome = launch(2, GENERATE, "--config", config(tmp_path, model), f"tensor_parallel.tp_size={tp_size}")
    refused(outcome, *words)


def test_missing_weights_are_all_named(tmp_path, model):
    file = model / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1000)
    outcome = launch(2, GENERATE, "--config", config(tmp_path, model))
    refused(outcome, "model.safetensors", "truncated")
    file.unlink()
    refused(launch(2, GENERATE, "--config", config(tmp_path, model)), "no safetensors file")


def test_one_shard_of_several_missing(tmp_path, model):
    make_checkpoint(model, Shape(), files=3)
    (model / "model-00002-of-00003.safetensors").unlink()
    (model / "model.safetensors").unlink()
    outcome = launch(2, GENERATE, "--config", config(tmp_path, model))
    refused(outcome, "model-00002-of-00003.safetensors", "missing")


def test_what_only_rank_0_needs_is_checked_before_the_ranks_join(tmp_path, model):
    """The tokenizer is rank 0's alone; the others must not be left waiting for it."""
    (model / "tokenizer_config.json").write_text("{broken")
    refused(launch(2, GENERATE, "--config", config(tmp_path, model)), "tokenizer")


def test_deepspeed_section_that_deepspeed_refuses(tmp_path, model):
    outcome = launch(2, GENERATE, "--config", config(tmp_path, model, "deepspeed: {max_out_tokens: many}\n"))
    refused(outcome, "deepspeed.max_out_tokens", "many")


def test_one_bad_request_does_not_cost_the_others(tmp_path, model):
    requests = tmp_path / "requests.jsonl"
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    rows = [{"id": "good", "prompt": "What colour is the shape?"}, {"id": "empty", "prompt": " "},
            {"id": "bad", "prompt": "What?", "images": ["bad.png"]}, {"id": "long", "prompt": "word " * 12000},
            {"id": "last", "prompt": "What shape is it?"}]
    requests.write_text("".join(json.dumps(r) + "\n" for r in rows))
    file = tmp_path / "c.yaml"
    file.write_text(f"model: {{path: {model}, dtype: float32}}\ntensor_parallel: {{tp_size: 2}}\n"
                    "generation: {max_new_tokens: 4}\nrequests: requests.jsonl\n")
    outcome = launch(2, GENERATE, "--config", str(file))
    assert outcome.code == 2, outcome.err[-3000:]
    out = [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]
    assert {r["id"] for r in out if "answer" in r} == {"good", "last"}
    reasons = {r["id"]: r["error"] for r in out if "error" in r}
    assert reasons.keys() == {"empty", "bad", "long"}
    assert "bad.png" in reasons["bad"] and "empty" in reasons["empty"] and "32767" in reasons["long"], reasons
    assert out[-1]["summary"] and out[-1]["answered"] == 2 and out[-1]["failed"] == 3
    assert "Traceback" not in outcome.err


def endless(tmp_path: Path, model: Path, ranks: int = 2, launcher: str = "deepspeed") -> Job:
    """A job that generates for minutes; returns once every rank is at it."""
    file = config(tmp_path, model, "generation: {max_new_tokens: 30000, min_new_tokens: 30000}\n")
    job = Job(ranks, GENERATE, "--config", file, f"tensor_parallel.tp_size={ranks}", launcher=launcher)
    deadline = time.monotonic() + 120
    while "generating" not in job.output():
        assert time.monotonic() < deadline and job.process.poll() is None, job.output()[-3000:]
        time.sleep(0.2)
    time.sleep(1)
    return job


def end(job: Job, within_s: float) -> tuple[int, str]:
    """Exit code and stderr of a job that must end in time and leave nothing."""
    outcome = job.finish(within_s)
    left = job.leftovers()
    assert not left, left
    return outcome.code, outcome.err


@pytest.mark.parametrize("launcher", [
    "deepspeed", *(pytest.param(other, marks=pytest.mark.sweep) for other in ("torchrun", "mpirun"))])
def test_killed_rank_is_named_and_ends_the_job(tmp_path, model, launcher):
    job = endless(tmp_path, model, launcher=launcher)
    pid = job.rank_pid(1) if launcher != "mpirun" else _mpi_rank(job, 1)
    assert not [n for n in set(os.listdir("/dev/shm")) - job.shm_before if "deepspeed" in n], "unlinked while running"
    os.kill(pid, signal.SIGKILL)
    code, seen = end(job, 20)
    assert code != 0
    if launcher == "torchrun" and "died" not in seen:  # its agent may be quicker, and names the rank too
        assert "rank      : 1 (local_rank: 1)" in seen and f"(pid: {pid})" in seen, seen[-3000:]
    else:
        assert f"rank 1 (process {pid}) died" in seen, seen[-3000:]
    assert launcher == "torchrun" or "Traceback" not in seen, seen[-3000:]


def _mpi_rank(job: Job, rank: int) -> int:
    for pid in job.descendants():
        if f"OMPI_COMM_WORLD_RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError("no such rank")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_ctrl_c_and_a_killed_launcher_leave_nothing(tmp_path, model, number):
    """Ctrl-C reaches the whole foreground group; SIGTERM (as of `timeout`) only the deepspeed command itself."""
    job = endless(tmp_path, model)
    if number == signal.SIGINT:
        os.killpg(job.process.pid, number)
    else:
        os.kill(job.process.pid, number)
    code, _ = end(job, 20)
    assert code != 0


def test_taken_port_is_reported_in_a_job_of_several_hosts(tmp_path, model):
    """Rank 0 of a job whose other rank is elsewhere: torch's own rendezvous, which listens on all addresses."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(taken.getsockname()[1])}
        outcome = Job(1, GENERATE, "--config", config(tmp_path, model), launcher="alone", env=env).finish(120)
    assert outcome.code == 2, outcome.err[-3000:]
    assert env["MASTER_PORT"] in outcome.err and "MASTER_PORT" in outcome.err and "Traceback" not in outcome.err


def test_taken_port_is_reported(tmp_path, model):
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        taken.listen()
        job = Job(2, GENERATE, "--config", config(tmp_path, model), port=port)
        outcome = job.finish(120)
    assert outcome.code == 2, outcome.err[-3000:]
    assert f"port {port}" in outcome.err and "--master_port" in outcome.err
    assert "Traceback" not in outcome.err
