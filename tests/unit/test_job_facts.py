"""What the ranks of a job compare: content, no paths, no addresses of objects."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import ROOT

from adapter.config.load import from_dict
from adapter.health.job_facts import facts_of_config, facts_of_model
from adapter.planning.load import checked_plan

DEMO = ROOT / "launch" / "demo" / "checkpoint"


def config(**sections):
    return from_dict({"model": {"path": str(DEMO), "dtype": "float32"}, "tensor_parallel": {"tp_size": 2},
                      "requests": [{"prompt": "What?", "images": ["a.png"]}], **sections}, Path("."))


def facts(given, defaults=None, section=None):
    plan, _ = checked_plan(DEMO, given.tensor_parallel.tp_size, "float32", given.tensor_parallel.vision, "dense")
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"), generation_config=defaults)
    return facts_of_model(model, plan, given.tensor_parallel, section or given.deepspeed) | facts_of_config(given)


@pytest.mark.parametrize("name, change", [
    ("generation", {"generation": {"max_new_tokens": 3}}), ("batch_size", {"batch_size": 2}),
    ("processor", {"processor": {"max_pixels": 10_000}}), ("deepspeed", {"deepspeed": {"max_out_tokens": 99}}),
    ("requests", {"requests": [{"prompt": "Who?"}]}), ("tensor_parallel", {"tensor_parallel": {"tp_size": 2,
                                                                                             "desync_check": 1}}),
])
def test_each_section_is_a_fact_of_its_own(name, change):
    before, after = facts(config()), facts(config(**change))
    assert {key for key in before if before[key] != after[key]} == {name}


def test_files_may_lie_elsewhere_on_another_host():
    elsewhere = config(requests=[{"prompt": "What?", "images": ["/other/disk/a.png"]}], output="/other/rows.jsonl")
    assert facts(elsewhere) == facts(config())


def test_objects_count_by_their_type():
    """Their words may have an address, which every process has another one of."""
    one = facts(config(), defaults=SimpleNamespace(to_dict=lambda: {"a": object()}), section={"mpu": object()})
    assert one == facts(config(), defaults=SimpleNamespace(to_dict=lambda: {"a": object()}), section={"mpu": object()})
    assert "0x" not in "".join(one.values())


def test_hosts_may_not_have_different_commits_of_a_hub_id():
    def cached(path: str):
        given = config()
        return facts(given.model_copy(update={"model": given.model.model_copy(update={"path": Path(path)})}))

    ours = cached("/a/hub/models--Qwen--Q/snapshots/1")
    assert ours == cached("/b/hub/models--Qwen--Q/snapshots/1") != cached("/b/hub/models--Qwen--Q/snapshots/2")
    assert cached("/a/1") == cached("/a/2")
