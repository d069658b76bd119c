"""Ranks of which one has a hook, or no compiler: they agree on what they send, and the answer is one process's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import Shape, make_checkpoint
from launching import launch

WORKER = Path(__file__).with_name("unlike_ranks_worker.py")
SHAPE = Shape(heads=6, kv_heads=2, layers=2, mlp=96, v_heads=4, v_head_dim=8, v_layers=1)
pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> list[dict]:
    directory = make_checkpoint(tmp_path_factory.mktemp("unlike") / "m", SHAPE)
    outcome = launch(2, WORKER, str(directory), "hook", "compiler", "gloo", timeout=120)
    assert outcome.code == 0, outcome.err[-3000:]
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]
    assert sorted(row["rank"] for row in rows) == [0, 1]
    return sorted(rows, key=lambda row: row["rank"])


@pytest.mark.parametrize("what", ["hook", "unhooked", "compiler", "gloo"])
def test_the_answer_is_one_processs(facts, what):
    for row in facts:
        assert row[what]["equal"] and row[what]["worst"] < 1e-4, row


def test_a_hook_on_one_rank_is_called_at_every_token_and_every_rank_says_why(facts):
    assert [row["hook"]["calls"] for row in facts] == [8, 0]
    for row in facts:
        assert any("rank 0" in line and "layers.1.mlp" in line for line in row["hook"]["logged"]), row
        assert not row["unhooked"]["logged"], row


def test_the_ranks_without_compiler_sum_through_gloo(facts):
    assert {row["gloo"]["route"] for row in facts} == {"torch group"}
