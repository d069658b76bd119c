"""A rank's memory follows its shard, not the checkpoint: at its highest while loading, and after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import Shape, make_checkpoint
from launching import launch

WORKER = Path(__file__).with_name("memory_worker.py")
BIG = Shape(heads=28, kv_heads=4, head_dim=64, layers=3, mlp=6144, vocab=24000, v_layers=2, v_head_dim=40)
OVERHEAD = 48 << 20  # module objects, allocator slack and one tensor in flight; the libraries are in `before`


@pytest.mark.ranks
def test_memory_stays_within_the_shard(tmp_path):
    directory = make_checkpoint(tmp_path / "big", BIG, dtype=torch.bfloat16)
    whole = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    outcome = launch(2, WORKER, str(directory), launcher="deepspeed")  # a forked rank shares its parent's memory
    assert outcome.code == 0, outcome.err[-3000:]
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]
    assert len(rows) == 2 and whole > 350e6, (whole, rows)
    for row in rows:
        assert row["shard"] < 0.55 * whole, row
        assert row["peak"] - row["before"] <= 1.15 * row["shard"] + OVERHEAD, row
        assert row["after"] - row["before"] <= 1.15 * row["shard"] + OVERHEAD, row
        assert row["peak"] - row["before"] >= 0.9 * row["shard"], ("the measurement sees the weights", row)
        assert row["read"] == row["shard"], row
