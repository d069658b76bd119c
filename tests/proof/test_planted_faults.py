"""Every planted fault is reported by verify, with the right module where it lives in one; a sound engine passes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from launching import ROOT, launch
from planted import FAULTS, STRADDLING

WORKER = Path(__file__).with_name("fault_worker.py")
CONFIG = str(ROOT / "configs" / "demo_tp4.yaml")
pytestmark = pytest.mark.ranks


@cache
def outcomes() -> dict[str, dict]:
    """One job for all faults at two ranks, one for those that need a rank across two KV groups; "" is the sound one."""
    rows = []
    for ranks, names in ((2, ["", *(n for n in FAULTS if n not in STRADDLING)]), (3, sorted(STRADDLING))):
        outcome = launch(ranks, WORKER, CONFIG, *names, timeout=400)
        assert outcome.code == 0, outcome.err[-5000:]
        rows += [json.loads(line) for line in outcome.out.splitlines() if line.startswith('{"fault"')]
    return {row["fault"]: row for row in rows}


def test_a_sound_engine_passes():
    row = outcomes()[""]
    assert row["passed"] and row["at_start"] == "held"
    assert row["case"]["first_divergent_module"] is None and row["summary"]["reassembly"]["equal"]
    assert row["case"]["greedy_match"] == {"equal": 4, "of": 4} and row["case"]["largest_share_of_bound"] < 0.5


@pytest.mark.parametrize("name", FAULTS)
def test_verify_reports_the_fault_and_names_its_module(name):
    fault, row = FAULTS[name], outcomes()[name]
    assert not row["passed"]
    first = row["case"]["first_divergent_module"]
    assert (first and first["module"]) == fault.module, row["summary"]["problems"]
    assert any(fault.says in problem for problem in row["summary"]["problems"])


@pytest.mark.parametrize("name", FAULTS)
def test_reassembly_reports_exactly_the_faults_in_weights(name):
    fault, row = FAULTS[name], outcomes()[name]
    differing = row["summary"]["reassembly"]["differing"]
    assert bool(differing) == fault.tensors
    if fault.tensors:
        block = fault.module.rpartition(".")[0]
        assert all(d["tensor"].startswith(block) for d in differing)


@pytest.mark.parametrize("name", [n for n, fault in FAULTS.items() if fault.at_start])
def test_the_self_test_refuses_to_start(name):
    said = outcomes()[name]["at_start"]
    assert "self-test failed" in said and f"{FAULTS[name].module}: " in said, said
