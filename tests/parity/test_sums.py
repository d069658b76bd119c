"""Sums through memory that ranks share: right to the last bit that rounding allows, and the same bits on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch

pytestmark = pytest.mark.ranks
WORKER = Path(__file__).with_name("sum_worker.py")


def rows(outcome) -> list[dict]:
    found = [json.loads(line) for line in outcome.out.splitlines() if line.startswith('{"rank"')]
    return sorted(found, key=lambda row: row["rank"])


@pytest.mark.parametrize("ranks, tp", [(2, 2), pytest.param(3, 3, marks=pytest.mark.sweep), (4, 4), (4, 2)])
def test_sums_and_gathers(ranks, tp):
    """(4, 2): two groups at once, each of which sums what is its own."""
    outcome = launch(ranks, WORKER, str(tp))
    assert outcome.code == 0, outcome.err[-3000:]
    found = rows(outcome)
    assert len(found) == ranks
    for row in found:
        assert max(row["errors"].values()) <= 1, row["errors"]
        assert row["strided"] and row["int64"] and row["gathered"] and row["gathered big"], row
        assert row["digests"] == found[row["rank"] // tp * tp]["digests"]
    assert tp == ranks or found[0]["digests"] != found[-1]["digests"]
    assert "microseconds for 4 KB and 524 KB: the adapter's shared memory" in found[0]["summing"]
    assert len({row["summing"].split(";")[0] for row in found}) == 1, "one choice for all"


def test_a_killed_rank_is_named_by_those_that_wait_for_it():
    outcome = launch(3, WORKER, "3", "killed", timeout=120)
    found = rows(outcome)
    assert [row["rank"] for row in found] == [0, 2], outcome.err[-3000:]
    for row in found:
        assert row["error"].startswith("rank 1 (process ") and "died" in row["error"], row
