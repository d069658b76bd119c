"""Ranks that part ways, stall or are late: the others say which, where, and end, instead of waiting for ever."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from launching import Job

WORKER = Path(__file__).with_name("desync_worker.py")
RANKS, PLANTED = 3, 1
PATIENCE_S = 900  # for what ends by itself; no test here is about how soon
pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("desync") / "m")


def wait_for(job: Job, words: str) -> None:
    """Until stderr has `words` (a regular expression)."""
    deadline = time.monotonic() + PATIENCE_S
    while not re.search(words, job.output()):
        assert time.monotonic() < deadline and job.process.poll() is None, (words, job.output()[-3000:])
        time.sleep(0.05)


def end(job: Job, within_s: float) -> tuple[int, str]:
    outcome = job.finish(within_s)
    left = job.leftovers()
    assert not left, left
    assert "Traceback" not in outcome.err, outcome.err[-5000:]
    return outcome.code, outcome.err


@pytest.fixture(scope="module")
def digests(model, tmp_path_factory) -> tuple[list[dict], int, str]:
    """What every rank saw, exit code and stderr of a job that ends by an uncaught Desync."""
    out = tmp_path_factory.mktemp("out")
    code, err = end(Job(RANKS, WORKER, "digests", str(model), str(out)), PATIENCE_S)
    return [json.loads((out / f"rank{r}.json").read_text()) for r in range(RANKS)], code, err


@pytest.mark.parametrize("how", ["greedy", "beams", "drawn"])
def test_without_a_fault_nothing_changes(digests, how):
    for facts in digests[0]:
        tokens = facts[f"no fault, {how}, off"]
        assert isinstance(tokens, list) and tokens == digests[0][0][f"no fault, {how}, off"]
        assert facts[f"no fault, {how}, on"] == facts[f"no fault, {how}, third"] == tokens
        assert facts["hooks left"] == 0
    assert digests[0][0]["afterwards, on"] == digests[0][0]["no fault, greedy, off"], "the engine still works"


@pytest.mark.parametrize("fault", ["token", "input ids", "position ids", "image features"])
def test_without_the_check_nobody_notices(digests, fault):
    tokens = [facts[f"{fault}, off"] for facts in digests[0]]
    assert all(isinstance(t, list) for t in tokens)
    if fault == "token":
        assert tokens[0] == tokens[2] != tokens[PLANTED], "and the ranks' answers differ"


@pytest.mark.parametrize("fault, step, quantity", [
    ("token, on", 4, "sampled token"),
    ("token, third", 4, "sampled token"),  # compared after step 6, and still the step is named
    ("token of a beam, on", 4, "sampled token"),
    ("EOS, on", 2, "sampled token"),
    ("criterion, on", 3, "end of generation"),
    ("input ids, on", 1, "input ids"),
    ("length, on", 1, "input ids"),
    ("position ids, on", 3, "position ids"),
    ("image features, on", 1, "image features"),
])
def test_every_rank_names_step_quantity_and_rank(digests, fault, step, quantity):
    for facts in digests[0]:
        assert isinstance(facts[fault], str), "not noticed"
        assert f"desync at step {step} " in facts[fault] and f": {quantity} on rank {PLANTED}" in facts[fault]
        assert facts[fault] == digests[0][0][fault]


def test_uncaught_it_is_a_message_and_exit_code_1(digests):
    _, code, err = digests
    assert code == 1
    assert re.search(r"^error on rank \d: desync at step 1 .*sampled token on rank 1", err, re.MULTILINE), err[-3000:]


@pytest.mark.long
def test_between_two_comparisons_a_rank_that_leaves_early_is_named_from_outside(model, tmp_path):
    """Without the check it would be in a collective of its own too, and with it only every 8th step as well."""
    code, err = end(Job(RANKS, WORKER, "early-torch", str(model), str(tmp_path)), PATIENCE_S)
    assert code == 3, err[-3000:]
    lines = "\n".join(line for line in err.splitlines() if "elsewhere" in line)
    assert re.search(r"rank 1 \(process \d+, \w+\) has been elsewhere for \d+ s", lines), err[-3000:]
    assert re.search(r"^rank [02]: rank 1 .* gives up and ends", lines, re.MULTILINE), err[-3000:]


def test_the_shared_memory_itself_sees_ranks_in_unlike_collectives(model, tmp_path):
    """At once, by the messages' sizes; a message on every rank, and no traceback."""
    code, err = end(Job(RANKS, WORKER, "early", str(model), str(tmp_path)), PATIENCE_S)
    assert "all-reduce: the adapter's shared memory" in err, err[-3000:]
    assert code == 1, err[-3000:]
    error = r"^error on rank \d: the ranks do not run the same steps: rank 1 .*desync_check=1"
    assert re.search(error, err, re.MULTILINE), err[-3000:]


def test_slow_preparation_is_a_warning_and_a_stopped_rank_is_named_and_ends_the_job(model, tmp_path):
    job = Job(RANKS, WORKER, "endless", str(model), str(tmp_path))
    for rank in (1, 2):
        wait_for(job, rf"rank {rank}: rank 0 \(process \d+, \w+\) has been preparing requests, or is late, for \d+ s")
    (tmp_path / "go").touch()
    wait_for(job, "generating")
    pid = job.rank_pid(PLANTED)
    os.kill(pid, signal.SIGSTOP)
    wait_for(job, rf"rank 1 \(process {pid}, stopped\) has been late for \d+ s at collective \d+ \(all-")
    code, err = end(job, PATIENCE_S)
    assert code == 3, err[-3000:]
    assert re.search(rf"^rank [02]: rank 1 \(process {pid}, stopped\) .* for \d+ s .* gives up", err, re.MULTILINE)
