"""Ranks that would choose different all-reduces: one choice for all of them, and no rank left waiting for others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch

pytestmark = pytest.mark.ranks


def test_one_rank_that_cannot_share_memory_decides_for_all():
    outcome = launch(2, Path(__file__).with_name("votes_worker.py"), timeout=120)
    assert outcome.code == 0, outcome.err[-3000:]
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith("{")]
    assert sorted(row["rank"] for row in rows) == [0, 1]
    assert all(row["sum"] == [3.0] * 4 and not row["fast"] for row in rows), rows
