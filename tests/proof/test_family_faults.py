"""verify and the self-test on the families beside Qwen2-VL: sound shards hold, faults in what is new are named."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from families import make_whole
from launching import launch
from planted_families import FAMILY_FAULTS

WORKER = Path(__file__).with_name("fault_worker.py")
CASES = [(family, name) for family, faults in FAMILY_FAULTS.items() for name in faults]
pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for family in FAMILY_FAULTS:
        make_whole(root / family, family)
        (root / f"{family}.yaml").write_text(f"model: {{path: {root / family}, dtype: float32}}\n"
                                             "tensor_parallel: {tp_size: 2}\n")
    return root


@cache
def outcomes(root: Path, family: str, ranks: int = 2, dtype: str = "float32") -> dict[str, dict]:
    names = ("", *(FAMILY_FAULTS[family] if dtype == "float32" else ()))
    outcome = launch(ranks, WORKER, str(root / f"{family}.yaml"), dtype, *names, timeout=400)
    assert outcome.code == 0, outcome.err[-5000:]
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith('{"fault"')]
    return {row["fault"]: row for row in rows}


@pytest.mark.parametrize("family", FAMILY_FAULTS)
def test_sound_shards_hold(home, family):
    row = outcomes(home, family)[""]
    assert row["passed"] and row["at_start"] == "held", row["summary"]["problems"]
    assert row["case"]["first_divergent_module"] is None and row["summary"]["reassembly"]["equal"]
    assert row["case"]["greedy_match"] == {"equal": 2, "of": 2} and row["case"]["largest_share_of_bound"] < 0.5
    assert all(layer["share_of_bound"] for layer in row["case"]["layers"]), "every layer was checked"


@pytest.mark.sweep
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("family", FAMILY_FAULTS)
def test_sound_shards_hold_in_bfloat16(home, family, ranks):
    row = outcomes(home, family, ranks, "bfloat16")[""]
    assert row["passed"] and row["at_start"] == "held", row["summary"]["problems"]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_verify_names_the_module_of_a_fault(home, family, name):
    fault, row = FAMILY_FAULTS[family][name], outcomes(home, family)[name]
    first = row["case"]["first_divergent_module"]
    assert not row["passed"] and (first and first["module"]) == fault.module, row["summary"]["problems"]
    assert fault.ranks is None or tuple(first["ranks"]) == fault.ranks, first
    assert bool(row["summary"]["reassembly"]["differing"]) == fault.tensors


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, n in CASES if FAMILY_FAULTS[f][n].at_start])
def test_the_self_test_refuses_to_start(home, family, name):
    reported = outcomes(home, family)[name]["at_start"]
    assert "self-test failed" in reported and f"{FAMILY_FAULTS[family][name].module}: " in reported, reported
