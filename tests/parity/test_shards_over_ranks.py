"""Ranks that load their shards compute what ranks that slice and quantise the original do, bit for bit, and read no
more than their files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import Shape, make_checkpoint
from launching import launch
from test_memory import BIG, OVERHEAD

from adapter.checkpoint.sharded import open_shards
from adapter.commands.shard import write_shards
from adapter.kernels import linear as kernels
from adapter.planning.load import checked_plan

HERE = Path(__file__).parent
GROUPED = Shape(heads=4, kv_heads=2, head_dim=64, mlp=256)
quantised = pytest.mark.skipif(kernels.missing() is not None, reason=f"no kernels: {kernels.missing()}")
pytestmark = pytest.mark.ranks


@dataclass(frozen=True)
class Run:
    """A model and how it is held, over `ranks`. Three: heads straddle two KV groups, and a tied head."""

    ranks: int
    dtype: str
    form: str
    shape: Shape


RUNS = {
    "two": [Run(2, "bfloat16", "dense", GROUPED), Run(2, "bfloat16", "int8", GROUPED),
            Run(2, "bfloat16", "int4", GROUPED)],
    "three": [Run(3, "float32", "dense", Shape()), Run(3, "float32", "dense", Shape(tied=True))],
}


def sharded(directory: Path, run: Run) -> tuple[Path, Path]:
    model = make_checkpoint(directory / "model", run.shape)
    write_shards(*checked_plan(model, run.ranks, run.dtype, form=run.form), directory / "shards")
    return model, directory / "shards"


@pytest.fixture(scope="module", params=[
    pytest.param("two", marks=quantised), "three"])
def pairs(request, tmp_path_factory) -> list[tuple[Run, Path, dict, dict]]:
    """Of each run (what it was, its shards, a row from the original, a row from the shards)."""
    runs, models = RUNS[request.param], []
    for run in runs:
        models += [(run, d) for d in sharded(tmp_path_factory.mktemp(run.form), run)]
    outcome = launch(runs[0].ranks, HERE / "shards_worker.py", runs[0].dtype, *(f"{r.form}={d}" for r, d in models))
    assert outcome.code == 0, outcome.err[-5000:]
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith('{"model"')]
    assert [row["model"] for row in rows] == [str(d) for _, d in models]
    return [(run, models[2 * i + 1][1], rows[2 * i], rows[2 * i + 1]) for i, run in enumerate(runs)]


def test_same_logits_and_tokens(pairs):
    for run, _, original, ours in pairs:
        assert original["spread"] > 0.3, "the model must say something"
        assert ours["logits"] == original["logits"] and ours["tokens"] == original["tokens"], run
    assert len({row["logits"] for *_, row in pairs}) == len(pairs), "formats and models differ"


def test_bytes_read_are_those_of_the_files_tensors(pairs):
    for run, directory, original, ours in pairs:
        plan, _ = checked_plan(directory, run.ranks, run.dtype, form=run.form)
        files = [sum(info.nbytes for info in file.values()) for file in open_shards(directory, plan).files]
        assert ours["read"] == ours["held"] == original["held"] == files, run
        if run.form != "dense":
            assert sum(ours["read"]) < sum(original["read"])


@pytest.mark.long
def test_memory_stays_within_the_shard(tmp_path):
    model = make_checkpoint(tmp_path / "model", BIG, dtype=torch.bfloat16)
    write_shards(*checked_plan(model, 2, "bfloat16"), tmp_path / "shards")
    outcome = launch(2, HERE / "memory_worker.py", str(tmp_path / "shards"), launcher="deepspeed")
    assert outcome.code == 0, outcome.err[-3000:]
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]
    assert len(rows) == 2
    for row in rows:
        assert row["shard"] > 100e6 and row["read"] == row["shard"], row
        assert row["peak"] - row["before"] <= row["shard"] + OVERHEAD, row
        assert row["peak"] - row["before"] >= 0.9 * row["shard"], ("the measurement sees the weights", row)
