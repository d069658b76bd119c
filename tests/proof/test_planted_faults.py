"""Every planted fault is reported by verify, with the right module where it lives in one; a sound engine passes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from launching import ROOT, launch
from planted import FAULTS, IN_BFLOAT16, STRADDLING

WORKER = Path(__file__).with_name("fault_worker.py")
CONFIG = str(ROOT / "configs" / "demo_tp4.yaml")
pytestmark = pytest.mark.ranks


JOBS = {  # ranks and dtype -> the faults of one job; "" is a sound engine
    (2, "float32"): ["", *(name for name in FAULTS if name not in STRADDLING)],
    (3, "float32"): sorted(STRADDLING),
    (2, "bfloat16"): ["", *IN_BFLOAT16],
}


@cache
def outcomes(ranks: int, dtype: str) -> dict[str, dict]:
    outcome = launch(ranks, WORKER, CONFIG, dtype, *JOBS[ranks, dtype], timeout=400)
    assert outcome.code == 0, outcome.err[-5000:]
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith('{"fault"')]
    return {row["fault"]: row for row in rows}


def outcome_of(name: str) -> dict:
    return outcomes(3 if name in STRADDLING else 2, "float32")[name]


def test_a_sound_engine_passes():
    row = outcomes(2, "float32")[""]
    assert row["passed"] and row["at_start"] == "held"
    assert row["case"]["first_divergent_module"] is None and row["summary"]["reassembly"]["equal"]
    assert row["case"]["greedy_match"] == {"equal": 2, "of": 2} and row["case"]["largest_share_of_bound"] < 0.5


@pytest.mark.parametrize("name", FAULTS)
def test_verify_reports_the_fault_and_names_its_module(name):
    fault, row = FAULTS[name], outcome_of(name)
    assert not row["passed"]
    first = row["case"]["first_divergent_module"]
    assert (first and first["module"]) == fault.module, row["summary"]["problems"]
    assert fault.ranks is None or tuple(first["ranks"]) == fault.ranks, first
    assert any((fault.says or fault.module) in problem for problem in row["summary"]["problems"])


@pytest.mark.sweep
@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_bfloat16_hides_none_of_them(name):
    row = outcomes(2, "bfloat16")[name]
    first = row["case"]["first_divergent_module"]
    assert not row["passed"] and first and first["module"] == FAULTS[name].module, row["summary"]["problems"]


@pytest.mark.sweep
def test_a_sound_engine_passes_in_bfloat16():
    assert outcomes(2, "bfloat16")[""]["passed"] and outcomes(2, "bfloat16")[""]["at_start"] == "held"


@pytest.mark.parametrize("name", FAULTS)
def test_reassembly_reports_exactly_the_faults_in_weights(name):
    fault, row = FAULTS[name], outcome_of(name)
    differing = row["summary"]["reassembly"]["differing"]
    assert bool(differing) == fault.tensors
    if fault.tensors:
        named = {d["tensor"].rpartition(".")[0] for d in differing}
        also = fault.module.replace("k_proj", "v_proj") if "KV head" in name else fault.module  # a head has both
        assert named == {fault.module, also}


@pytest.mark.parametrize("name", [n for n, fault in FAULTS.items() if fault.at_start])
def test_the_self_test_refuses_to_start(name):
    reported = outcome_of(name)["at_start"]
    assert "self-test failed" in reported and f"{FAULTS[name].module}: " in reported, reported
