"""Ranks that would choose different all-reduces: one choice for all of them, and no rank left waiting for others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import ROOT, launch

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
    outcome = launch(2, Path(__file__).with_name("votes_worker.py"), what, timeout=600)
    assert outcome.code == 0, outcome.err[-3000:]
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]
    assert sorted(row["rank"] for row in rows) == [0, 1]
    assert all(row["sum"] == [3.0] * 4 for row in rows), rows
    assert rows[0]["route"] == rows[1]["route"] != refusal.removeprefix("not ").partition(":")[0], rows
    assert next(row["summing"] for row in rows if row["rank"] == 0).endswith(refusal), rows


@pytest.mark.parametrize("what, difference", [
    ("generation", 'generation: {"max_new_tokens": 8} (rank 0); {"max_new_tokens": 9} (rank 1)'),
    pytest.param("release", "; 4.49.0 (rank 1)", marks=pytest.mark.sweep),
    pytest.param("tp_size", "tp_size: 2 (rank 0); 1 (rank 1)", marks=pytest.mark.sweep),
])
def test_unlike_ranks_end_before_they_share_work(what, difference):
    """They would hang, or answer with the tokens of two configurations."""
    worker = Path(__file__).with_name("unlike_worker.py")
    outcome = launch(2, worker, what, str(ROOT / "launch" / "demo" / "checkpoint"), timeout=600)
    assert outcome.code == 2, outcome.err[-3000:]
    assert "the ranks of this job are not alike" in outcome.err and difference in outcome.err, outcome.err[-3000:]
    assert "Traceback" not in outcome.err
