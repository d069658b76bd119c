"""Four ranks as replicas: each computes what one process does, whoever made the groups; the demo over two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from launching import ROOT, launch

from adapter.parallel.all_reduce import DEEPSPEED

WORKER = Path(__file__).with_name("replica_worker.py")
GENERATE = ROOT / "launch" / "generate.py"
pytestmark = pytest.mark.ranks
OURS, THEIRS = ([[0, 1], [2, 3]], [[0, 2], [1, 3]]), ([[0, 2], [1, 3]], [[0, 1], [2, 3]])


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> list[dict]:
    directory = make_checkpoint(tmp_path_factory.mktemp("replicas") / "m")
    outcome = launch(4, WORKER, str(directory))
    assert outcome.code == 0, outcome.err[-5000:]
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith('{"rank"')]
    return sorted(rows, key=lambda row: row["rank"])


@pytest.mark.parametrize("how, tp, dp", [
    ("ours", *OURS), ("tp1", [[0], [1], [2], [3]], [[0, 1, 2, 3]]), ("files", *THEIRS), ("loaded", *THEIRS),
    ("kept_call", *THEIRS),
])
def test_every_replica_computes_what_one_process_does(facts, how, tp, dp):
    assert len(facts) == 4
    for row in facts:
        rank, found = row["rank"], row[how]
        mine = next(ranks for ranks in tp if rank in ranks)
        assert found["tp_ranks"] == mine and found["tp_rank"] == mine.index(rank), found
        assert found["dp_ranks"] == next(ranks for ranks in dp if rank in ranks), found
        assert found["replica"] == found["dp_ranks"].index(rank)
        assert found["logits"] <= 1e-4 and found["greedy"] and found["sampled"], found
        assert found["route"] != DEEPSPEED.name, "it would sum over the replicas"
    if how != "tp1":
        assert all(row[how]["shard"] < 0.6 * row["tp1"]["shard"] for row in facts)


def test_an_mpu_that_does_not_fit_is_refused_with_its_numbers(facts):
    for row in facts:
        assert "tp_size is 4" in row["unequal"] and "has 2 ranks" in row["unequal"]
        assert "get_tensor_model_parallel_group" in row["no_mpu"]
        assert "4 ranks" in row["no_replicas"] and "one of 1, 2, 4" in row["no_replicas"]


def test_the_demo_over_two_replicas():
    config = str(ROOT / "configs" / "demo_tp4.yaml")
    outcome = launch(4, GENERATE, "--config", config, "tensor_parallel.tp_size=2", "batch_size=3")
    assert outcome.code == 0, outcome.err[-3000:]
    *rows, summary = [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]
    requests = (ROOT / "launch" / "demo" / "requests.jsonl").read_text().splitlines()
    assert [row["id"] for row in rows] == [json.loads(line)["id"] for line in requests], "in order, whoever answered"
    assert all(row["correct"] for row in rows)
    assert summary["replicas"] == 2 and summary["answered"] == 12
    assert [r["replica"] for r in summary["ranks"]] == [0, 0, 1, 1]
    assert [r["q_heads"] for r in summary["ranks"]] == [[0, 14], [14, 28]] * 2
    assert "replicas: 2" in outcome.err
