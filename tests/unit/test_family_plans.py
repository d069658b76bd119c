"""Plans of the published checkpoints of the families beside Qwen2-VL, and tables held against Transformers' models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from families import CLASSES, CONFIGS, make_family
from published_families import PUBLISHED
from safetensors.torch import save_file

from adapter.config.release import class_of
from adapter.planning.cost_model import Workload, vision_work
from adapter.planning.load import make_plan
from policies import export
from policies.errors import UserError
from policies.formats import INT8
from policies.registry import POLICIES, policy_for

TOTAL_BYTES = {  # `total_size` of the index files
    "Qwen2.5-VL-3B": 7_509_245_952, "Qwen2.5-VL-7B": 16_584_333_312, "Qwen3-VL-8B": 17_534_247_392,
}


def plan_of(directory: Path, config: dict, tp_size: int, vision: str = "tensor"):
    (directory / "config.json").write_text(json.dumps(config))
    plan, checkpoint, problems = make_plan(directory, tp_size, "bfloat16", vision)
    assert checkpoint is None
    return plan, problems


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_size_at_every_tp(tmp_path, name):
    whole = plan_of(tmp_path, PUBLISHED[name], 1)[0].weight_bytes(0)
    assert whole == TOTAL_BYTES.get(name, whole)
    for tp_size in range(1, min(16, plan_of(tmp_path, PUBLISHED[name], 1)[0].geometry.attention["text"].q_heads) + 1):
        plan, problems = plan_of(tmp_path, PUBLISHED[name], tp_size)
        assert not problems and not plan.geometry.assumed
        held = [plan.weight_bytes(rank) for rank in range(tp_size)]
        assert whole <= sum(held) and max(held) < 1.35 * whole / tp_size, held


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_claims_every_parameter_of_the_published_model_and_no_other(name):
    """Names and shapes of the model that Transformers builds, on `meta`."""
    config = PUBLISHED[name]
    policy = policy_for(config)
    stated = {key: value for key, value in config.items() if key not in ("architectures", "transformers_version")}
    with torch.device("meta"):
        model = class_of(policy)(getattr(transformers, policy.model_class.replace(
            "ForConditionalGeneration", "Config"))(**stated))
    parameters = {policy.published(n): tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    geometry = policy.geometry(config)
    policy.check_claims(parameters, geometry)
    assert {n: s for n, s in policy.inventory(geometry).items() if n in parameters} == parameters


@pytest.mark.parametrize("family", CLASSES)
def test_files_that_transformers_writes_are_sound(tmp_path, family):
    directory = make_family(tmp_path / family, family)
    for tp_size in (1, 5, 12):
        assert not make_plan(directory, tp_size, "float32")[2]
    assert any("13" in problem for problem in make_plan(directory, 13, "float32")[2])


@pytest.mark.parametrize(("family", "section", "change", "words"), [
    ("qwen2_5_vl", "vision_config", {"out_hidden_size": 64}, ["out_hidden_size 64", "hidden_size 96"]),
    ("qwen2_5_vl", "vision_config", {"fullatt_block_indexes": 1}, ["fullatt_block_indexes"]),
    ("qwen2_5_vl", "vision_config", {"window_size": 7}, ["window_size", "7"]),
    ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [1, 1]}, ["deepstack_visual_indexes", "each once"]),
    ("qwen3_vl", "text_config", {"head_dim": 7}, ["head_dim 7"]),
    ("qwen3_vl", "text_config", {"head_dim": "x"}, ["head_dim"]),
    ("qwen3_5", "text_config", {"layer_types": ["full_attention"]}, ["layer_types", "each of 3 layers"]),
    ("qwen3_5", "text_config", {"layer_types": ["sliding_attention"] * 3}, ["layer_types"]),
    ("qwen3_5", "text_config", {"linear_num_value_heads": 33}, ["linear_num_value_heads 33", "key_heads 16"]),
    ("qwen3_5", "text_config", {"linear_num_key_heads": 1}, ["tp_size 2", "linear_num_key_heads", "there are 1"]),
    ("qwen3_5", "text_config", {"head_dim": 32}, ["mrope_section", "partial_rotary_factor 0.25"]),
])  # fmt: skip
def test_a_geometry_that_cannot_be_is_refused(tmp_path, family, section, change, words):
    config = CONFIGS[family] | {"model_type": family}
    config |= {section: config[section] | change}
    try:
        found = " ".join(plan_of(tmp_path, config, 2)[1])
    except UserError as error:
        found = str(error)
    assert all(word in found for word in words), found


def test_heads_of_linear_layers_are_cut_together(tmp_path):
    """16 key heads with 3 value heads each over 3 ranks, 5, 5 and 6 of them: q, k, v and what one value head has."""
    plan, _ = plan_of(tmp_path, PUBLISHED["Qwen3.5-27B"], 3)
    name, keys = "model.language_model.layers.0.linear_attn", [(0, 5), (5, 10), (10, 16)]
    for rank, (a, b) in enumerate(keys):
        k, v = 128 * 16, 128
        parts = ((a * v, b * v), (k + a * v, k + b * v), (2 * k + 3 * a * v, 2 * k + 3 * b * v))
        assert plan.slice(f"{name}.in_proj_qkv", "weight", rank).ranges == parts
        assert plan.slice(name, "conv1d.weight", rank).ranges == parts
        assert plan.slice(name, "A_log", rank).ranges == ((3 * a, 3 * b),)
        assert plan.slice(f"{name}.in_proj_a", "weight", rank).ranges == ((3 * a, 3 * b),)
        assert plan.slice(f"{name}.out_proj", "weight", rank).ranges == ((3 * a * v, 3 * b * v),)
        # 48 of 64 layers: [value heads, 128, 128] in float32, 4 tokens of q | k | v in bfloat16
        assert plan.state_bytes(rank) == 48 * (b - a) * (3 * 128 * 128 * 4 + 5 * 128 * 4 * 2)
    attention = plan.slice("model.language_model.layers.3.self_attn.q_proj", "weight", 1).ranges
    assert attention == ((512 * 8, 512 * 16),), "a query and its gate are one head of twice the width"
    assert plan.kv_bytes_per_token(1) == 2 * 16 * 2 * 256 * 2, "keys and values of 16 layers, 2 KV heads"
    assert "decays of linear layers; use weights.format=dense" in replace(plan, form=INT8).off_group()[0]


def test_tensors_that_nothing_uses_are_no_problem(tmp_path):
    """Published files of Qwen3.5 have a head that predicts more tokens, `mtp.*`, which Transformers ignores."""
    directory = make_family(tmp_path / "qwen3_5", "qwen3_5")
    save_file({"mtp.fc.weight": torch.ones(2, 2)}, directory / "model-mtp.safetensors", {"format": "pt"})
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["mtp.fc.weight"] = "model-mtp.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not make_plan(directory, 2, "float32")[2]


def test_windows_make_attention_cheaper(tmp_path):
    """What `vision: auto` weighs: of three layers two attend in windows of 16 patches."""
    config = CONFIGS["qwen2_5_vl"] | {"model_type": "qwen2_5_vl"}
    plan, _ = plan_of(tmp_path, config, 1)
    windowed = vision_work(plan, Workload(40, (64,)), 0).attention_flop
    config |= {"vision_config": config["vision_config"] | {"fullatt_block_indexes": [0, 1, 2]}}
    plan, _ = plan_of(tmp_path, config, 1)
    whole = vision_work(plan, Workload(40, (64,)), 0).attention_flop
    assert windowed * 3 == whole * (1 + 2 * 16 / 64)


def test_a_release_without_the_family_is_named():
    unknown = replace(POLICIES["qwen3_vl"], model_class="Qwen3VLOfALaterRelease")
    with pytest.raises(UserError, match=r"qwen3_vl needs Transformers 4\.57 or later"):
        class_of(unknown)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("dialect", export.DIALECTS)
def test_words_of_tools_that_have_not_run_the_family_are_refused(family, dialect):
    policy = POLICIES[family]
    with pytest.raises(UserError, match=f"{family} as {dialect}: .*has not run.*adapter.init_inference"):
        export.DIALECTS[dialect](policy, policy.geometry(CONFIGS[family]), 2)
