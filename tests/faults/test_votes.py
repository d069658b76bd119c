"""Ranks that would choose different all-reduces: one choice for all of them, and no rank left waiting for others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("what, refusal", [
    ("cores", "not DeepSpeed's shared-memory op: it busy-waits, too slow with 2 ranks on 1 core"),
    ("bound", "not DeepSpeed's shared-memory op: it busy-waits, too slow with 2 ranks on 1 core"),
    ("build", "not the adapter's shared memory: rank 1: no compiler here"),
    pytest.param("open", "not the adapter's shared memory: rank 1: rank 0's memory cannot be opened: not here",
                 marks=pytest.mark.sweep),
    pytest.param("create", "not the adapter's shared memory: rank 0: no memory to share: not here",
                 marks=pytest.mark.sweep),
])
def test_one_rank_that_cannot_decides_for_all(what, refusal):
    outcome = launch(2, Path(__file__).with_name("votes_worker.py"), what, timeout=120)
    assert outcome.code == 0, outcome.err[-3000:]
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]
    assert sorted(row["rank"] for row in rows) == [0, 1]
    assert all(row["sum"] == [3.0] * 4 for row in rows), rows
    assert rows[0]["route"] == rows[1]["route"] != refusal.removeprefix("not ").partition(":")[0], rows
    assert next(row["summing"] for row in rows if row["rank"] == 0).endswith(refusal), rows
