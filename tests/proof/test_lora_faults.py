"""verify on an adapter over both encoders: sound shards hold; a slice that lacks it, or a wrong factor, is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import ROOT, launch
from loras import linears, make_lora

from adapter.planning.load import checked_plan

WORKER = Path(__file__).with_name("lora_fault_worker.py")
DEMO = ROOT / "launch" / "demo"
pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict]:
    home = tmp_path_factory.mktemp("lora")
    plan, _ = checked_plan(DEMO / "checkpoint", 2, "float32")
    modules = linears(plan.policy.inventory(plan.geometry))
    del modules["lm_head"]
    make_lora(home / "a", modules, r=2, lora_alpha=0.5)
    (home / "c.yaml").write_text(json.dumps({
        "model": {"path": str(DEMO / "checkpoint"), "dtype": "float32", "adapters": ["a"]},
        "generation": {"max_new_tokens": 4, "do_sample": False, "num_beams": 1},
        "requests": [{"prompt": "What colour is the shape?", "images": [str(DEMO / "pictures" / "01-colour.png")]}]}))
    outcome = launch(2, WORKER, str(home / "c.yaml"))
    assert outcome.code == 0, outcome.err[-5000:]
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith('{"fault"')]
    return {row["fault"]: row for row in rows}


def test_sound_shards_hold(outcomes):
    row = outcomes[""]
    assert row["passed"] and row["summary"]["reassembly"]["equal"], row["summary"]["problems"]
    assert row["summary"]["adapters"] == ["a"]
    assert row["case"]["greedy_match"] == {"equal": 4, "of": 4} and row["case"]["max_abs_logit_diff"] < 1e-4


@pytest.mark.parametrize(("name", "ranks"), [("one rank only", {1}), ("wrong scale", {0, 1})])
def test_verify_names_what_is_merged_wrongly(outcomes, name, ranks):
    row = outcomes[name]
    found = row["summary"]["reassembly"]["differing"]
    assert not row["passed"] and {item["rank"] for item in found} == ranks, row["summary"]["problems"]
    assert {item["tensor"].split(".")[0] for item in found} == {"model", "visual"}
    assert row["case"]["first_divergent_module"]["module"] == "visual.blocks.0.attn.qkv"
