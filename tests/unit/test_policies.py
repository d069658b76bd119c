"""A table that claims all parameters, once, and the slices that it gives every rank; pages by model_type."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import Shape, newer_name
from families import CONFIGS

from policies.errors import UserError
from policies.families.qwen2_vl import POLICY, TABLE
from policies.heads import split_heads
from policies.registry import policy_for
from policies.rules import Claim, Column, FusedQKV, Replicated, Row, TensorSlice, expand, slice_of

# The table

LAYERED = Shape(heads=12, kv_heads=4, head_dim=4, layers=2, mlp=100, vocab=57, v_heads=6, v_head_dim=4, v_layers=2)


def geometry_of(shape: Shape):
    return POLICY.geometry(shape.config())


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_claims_what_the_model_has(tied):
    shape = replace(LAYERED, tied=tied)
    inventory = POLICY.inventory(geometry_of(shape))
    expected = shape.tensors() | {"lm_head.weight": (shape.vocab, shape.hidden)}
    assert inventory == expected
    POLICY.check_claims(expected, geometry_of(shape))


def test_a_tied_head_may_be_absent_and_an_untied_one_may_not():
    names = LAYERED.tensors().keys() - {"lm_head.weight"}
    POLICY.check_claims(names, geometry_of(replace(LAYERED, tied=True)))
    with pytest.raises(UserError, match=r"'lm_head\.weight' claims nothing"):
        POLICY.check_claims(names, geometry_of(LAYERED))


@pytest.mark.parametrize("row", TABLE, ids=lambda claim: claim.module)
def test_a_dropped_row_is_an_error_that_names_its_parameters(row):
    policy = replace(POLICY, table=tuple(c for c in TABLE if c is not row))
    geometry = geometry_of(LAYERED)
    with pytest.raises(UserError) as caught:
        policy.check_claims(LAYERED.tensors(), geometry)
    for module in expand(row.module, geometry.layers):
        for suffix in row.parameters():
            assert f"no rule claims '{module}.{suffix}'" in str(caught.value)


@pytest.mark.parametrize("row", TABLE, ids=lambda claim: claim.module)
def test_a_second_row_for_a_module_is_an_error_that_names_both(row):
    one = replace(row, module=row.module.replace("*", "1"))
    with pytest.raises(UserError) as caught:
        replace(POLICY, table=(*TABLE, one)).check_claims(LAYERED.tensors(), geometry_of(LAYERED))
    assert f"{row.module!r} and {one.module!r} both claim {one.module!r}" in str(caught.value)


@pytest.mark.parametrize(("module", "named"), [
    ("model.layers.*.mlp.router", "'model.layers.1.mlp.router.weight'"),
    ("audio.proj", "'audio.proj.weight'"),
    ("model.layers.7.mlp.gate_proj", "'model.layers.7.mlp.gate_proj.weight'"),
    ("model.experts.*.up_proj", "'model.experts.*.up_proj'"),
])
def test_a_row_that_claims_nothing_is_an_error_that_names_it(module, named):
    policy = replace(POLICY, table=(*TABLE, Claim(module, Column(), ("mlp", "hidden"))))
    with pytest.raises(UserError) as caught:
        policy.check_claims(LAYERED.tensors(), geometry_of(LAYERED))
    assert named in str(caught.value)


@pytest.mark.parametrize(("bias", "message"), [
    (None, r"no rule claims 'model\.layers\.0\.self_attn\.q_proj\.bias'"),
    (("mlp",), r"'model\.layers\.0\.mlp\.up_proj\.bias' claims nothing"),
])
def test_a_bias_forgotten_or_invented_is_an_error(bias, message):
    at = "up_proj" if bias else "q_proj"
    table = tuple(replace(c, bias=bias) if c.module.endswith(at) else c for c in TABLE)
    with pytest.raises(UserError, match=message):
        replace(POLICY, table=table).check_claims(LAYERED.tensors(), geometry_of(LAYERED))


def test_every_mismatch_is_reported_at_once():
    lost, extra = {"model.norm.weight", "visual.blocks.1.norm2.bias"}, {"model.extra.weight"}
    names = (LAYERED.tensors().keys() - lost) | extra
    with pytest.raises(UserError) as caught:
        POLICY.check_claims(names, geometry_of(LAYERED))
    assert all(n in str(caught.value) for n in lost | extra)


def test_nothing_else_is_replicated():
    """Replication is written down with a reason, row by row; what is not in this list is cut."""
    replicated = {c.module.rsplit(".", 1)[-1] for c in TABLE if isinstance(c.rule, Replicated)}
    assert replicated == {"input_layernorm", "post_attention_layernorm", "norm", "norm1", "norm2", "ln_q", "proj"}
    assert [c.module for c in TABLE if isinstance(c.rule, Replicated) and c.module.endswith("proj")] == [
        "visual.patch_embed.proj"]
    assert all(c.rule.why for c in TABLE if isinstance(c.rule, Replicated))


# Slices

def index_of(part: TensorSlice) -> tuple:
    """A slice as a numpy index."""
    if part.dim is None:
        return ()
    return (*[slice(None)] * part.dim, np.concatenate([np.arange(a, b) for a, b in part.ranges]))


def slices(shape: Shape, tp: int):
    """(name, claim, suffix, that parameter's slice on every rank) of every parameter."""
    geometry = geometry_of(shape)
    splits = POLICY.splits(geometry, tp)
    for module, claim in POLICY.claims(geometry).items():
        for suffix in claim.parameters():
            parts = [slice_of(claim, suffix, geometry.sizes, splits, r) for r in range(tp)]
            yield f"{module}.{suffix}", claim, suffix, parts


ONE_LAYER = Shape(layers=1, v_layers=1)
GEOMETRIES = [LAYERED, ONE_LAYER, replace(ONE_LAYER, heads=8, kv_heads=2, v_heads=4)]


@pytest.mark.parametrize("shape", GEOMETRIES, ids=["12/4", "28/4", "8/2"])
@pytest.mark.parametrize("tp", range(1, 9))
def test_the_slices_of_all_ranks_make_the_whole(shape, tp):
    """Put back where they came from they give every element, as often as heads and the table declare."""
    kv_owners = np.zeros(shape.kv_heads, int)
    for s in split_heads(shape.heads, shape.kv_heads, shape.head_dim, tp):
        kv_owners[s.kv[0] : s.kv[1]] += 1
    seen = set()
    for name, claim, suffix, parts in slices(shape, tp):
        whole = np.arange(np.prod(parts[0].shape)).reshape(parts[0].shape)
        back, copies = np.full_like(whole, -1), np.zeros_like(whole)
        for part in parts:
            piece = whole[index_of(part)]
            assert piece.shape == part.local_shape, name
            back[index_of(part)] = piece
            copies[index_of(part)] += 1
        assert (back == whole).all(), name
        if isinstance(claim.rule, Replicated) or (isinstance(claim.rule, Row) and suffix == "bias"):
            assert all(p.dim is None for p in parts) and (copies == tp).all(), name
        elif claim.weight[0] == "kv":
            owners = np.repeat(kv_owners, shape.head_dim)
            assert (copies == (owners[:, None] if suffix == "weight" else owners)).all(), name
        else:
            assert (copies == 1).all(), name
        seen.add(type(claim.rule))
    assert len(seen) == 6


@pytest.mark.parametrize("shape", GEOMETRIES, ids=["12/4", "28/4", "8/2"])
@pytest.mark.parametrize("tp", range(1, 9))
def test_fused_qkv_is_cut_by_heads_in_each_part_weight_and_bias_alike(shape, tp):
    heads = split_heads(shape.v_heads, shape.v_heads, shape.v_head_dim, tp)
    fused = [(suffix, parts) for _, claim, suffix, parts in slices(shape, tp) if isinstance(claim.rule, FusedQKV)]
    assert {suffix for suffix, _ in fused} == {"weight", "bias"}
    for _, parts in fused:
        for shard, part in zip(heads, parts, strict=True):
            labels = np.array([(p, h) for p in "qkv" for h in range(shape.v_heads) for _ in range(shape.v_head_dim)])
            assert part.dim == 0
            assert [tuple(x) for x in labels[index_of(part)]] == [
                (p, str(h)) for p in "qkv" for h in range(*shard.q) for _ in range(shape.v_head_dim)]


@pytest.mark.parametrize("tp", range(1, 9))
def test_linear_layers_that_meet_are_cut_alike(tp):
    """What a column-parallel layer gives, its row-parallel partner takes; a bias goes with its rows or stays whole."""
    parts = {name: p for name, _, _, p in slices(LAYERED, tp)}
    pairs = [("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"),
             ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"),
             ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"),
             ("visual.blocks.0.mlp.fc1", "visual.blocks.0.mlp.fc2"), ("visual.merger.mlp.0", "visual.merger.mlp.2")]
    for column, row in pairs:
        for c, r in zip(parts[f"{column}.weight"], parts[f"{row}.weight"], strict=True):
            assert (c.dim, r.dim, c.ranges) == (0, 1, r.ranges)
    for name, claim, suffix, bias in slices(LAYERED, tp):
        if suffix == "bias":
            weight = parts[name.removesuffix("bias") + "weight"]
            cut = not isinstance(claim.rule, Row | Replicated)
            assert all((b.dim, b.ranges) == ((0, w.ranges) if cut else (None, ()))
                       for b, w in zip(bias, weight, strict=True))


# The family's page and the registry

def test_both_namings_are_one():
    for name in LAYERED.tensors():
        assert POLICY.published(newer_name(name)) == name == POLICY.published(name)


CUTTING = ["hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
           "num_hidden_layers"]


@pytest.mark.parametrize("key", CUTTING)
@pytest.mark.parametrize("nested", [False, True])
def test_a_size_of_the_text_layers_must_be_stated(key, nested):
    """Transformers would take that of another model: 8 KV heads where none are stated."""
    config = LAYERED.config()
    del config[key]
    with pytest.raises(UserError, match=f"config.json: '{key}' is missing; .*state it"):
        POLICY.geometry({"model_type": "qwen2_vl", "vision_config": config["vision_config"], "text_config": config}
                        if nested else config)


SEVEN_VISION = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 3584,
                "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}
WRITTEN = {"transformers_version": "4.45.0"}
BY_OLD_RELEASES = {"hidden_size": 3584, "in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14}
BY_NEW_RELEASES = {k: v for k, v in SEVEN_VISION.items() if k not in ("in_chans", "spatial_patch_size")} | {
    "in_channels": 3}


@pytest.mark.parametrize("change, assumed", [
    (WRITTEN | {"vision_config": SEVEN_VISION}, []),
    ({"vision_config": SEVEN_VISION}, []),
    (WRITTEN | {"vision_config": BY_OLD_RELEASES}, []),
    (WRITTEN | {"vision_config": BY_OLD_RELEASES | {"depth": 4}}, []),
    (WRITTEN | {"vision_config": BY_NEW_RELEASES}, []),
    (WRITTEN | {"vision_config": {k: v for k, v in SEVEN_VISION.items() if k != "num_heads"}},
     ["vision_config.num_heads"]),
    ({"vision_config": {k: v for k, v in SEVEN_VISION.items() if k not in ("depth", "in_chans")}},
     ["vision_config.depth", "vision_config.in_chans"]),
    ({}, [f"vision_config.{k}" for k in SEVEN_VISION if k not in ("hidden_size", "spatial_patch_size")]),
], ids=["published", "no release", "old releases", "old releases, one other", "new releases", "a key taken out",
        "two left out", "no vision_config"])
def test_defaults_that_a_person_left_to_chance_are_known(change, assumed):
    """A release of Transformers that writes a file leaves out each vision key that has its default, or none."""
    config = {k: v for k, v in LAYERED.config().items() if k != "vision_config"} | change
    assert sorted(POLICY.geometry(config).assumed) == sorted(assumed)


def test_what_transformers_itself_writes_leaves_nothing_to_chance(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.Qwen2VLConfig(**LAYERED.config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["transformers_version"] and not POLICY.geometry(config).assumed


def test_text_fields_may_be_flat_or_nested():
    flat = LAYERED.config()
    outer = {"model_type", "vision_config", "tie_word_embeddings"}
    nested = {k: v for k, v in flat.items() if k in outer} | {
        "text_config": {k: v for k, v in flat.items() if k not in outer}}
    assert POLICY.geometry(nested) == POLICY.geometry(flat)


@pytest.mark.parametrize(("change", "words"), [
    ({"heads": 12, "kv_heads": 5}, ["num_attention_heads 12", "num_key_value_heads 5"]),
    ({"v_heads": 6, "v_head_dim": 6}, ["head_dim 6", "multiple of 4"]),
    ({"head_dim": 3}, ["head_dim 3", "even"]),
    ({"mlp": 3, "vocab": 2}, ["mlp has only 3", "vocab has only 2"]),
])
def test_problems_name_the_numbers(change, words):
    found = "\n".join(POLICY.problems(geometry_of(replace(LAYERED, **change)), 4))
    assert all(w in found for w in words), found


@pytest.mark.parametrize("tp", [0, 13, 100])
def test_each_rank_needs_a_query_head(tp):
    assert any(f"tp_size {tp}" in p and "there are 12" in p for p in POLICY.problems(geometry_of(LAYERED), tp))


@pytest.mark.parametrize("tp", range(1, 13))
def test_every_tp_size_up_to_the_heads_is_fine(tp):
    assert POLICY.problems(geometry_of(LAYERED), tp) == []


def test_known_model_type():
    assert policy_for({"model_type": "qwen2_vl"}) is POLICY


@pytest.mark.parametrize("model_type", ["qwen2-vl", "qwn2_vl", "Qwen2_VL"])
def test_unknown_model_type_names_the_nearest(model_type):
    with pytest.raises(UserError) as caught:
        policy_for({"model_type": model_type}, "there/config.json")
    message = str(caught.value)
    assert all(w in message for w in (repr(model_type), "there/config.json", "nearest known one is 'qwen2_vl'"))


@pytest.mark.parametrize(("model_type", "why"), [
    ("qwen3_5_moe", "shared expert"), ("qwen4_exp", "hyper"), ("qwen2_5_omni", "audio")])  # fmt: skip
def test_a_relative_without_a_page_is_refused_with_the_reason(model_type, why):
    with pytest.raises(UserError, match=rf"model_type '{model_type}' cannot be split yet: .*{why}"):
        policy_for({"model_type": model_type, "vision_config": {}})


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": ["qwen2_vl"]}, {"model_type": "bert"}])
def test_any_other_model_type_is_a_user_error_with_the_known_ones(config):
    with pytest.raises(UserError, match="known: qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_vl"):
        policy_for(config)


def test_a_row_stands_for_layers_of_its_kind_alone_and_experts_are_cut_in_width_or_dealt():
    policy = policy_for({"model_type": "qwen3_vl_moe"})
    geometry = policy.geometry(CONFIGS["qwen3_vl_moe"])  # layer 1 of 3 is dense; 6 experts, 28 wide, hidden 80
    claims, stack = policy.claims(geometry), "model.language_model.layers"
    assert f"{stack}.1.mlp.gate_proj" in claims and f"{stack}.1.mlp.experts" not in claims
    assert f"{stack}.0.mlp.gate_proj" not in claims and f"{stack}.2.mlp.experts" in claims
    found = {by: [slice_of(policy.experts_by(by).claims(geometry)[f"{stack}.0.mlp.experts"], suffix, geometry.sizes,
                           policy.experts_by(by).splits(geometry, 2), 1) for suffix in ("gate_up_proj", "down_proj")]
             for by in ("tensor", "expert")}
    assert [(part.dim, part.ranges) for part in found["tensor"]] == [(1, ((14, 28), (42, 56))), (2, ((14, 28),))]
    assert [(part.dim, part.ranges) for part in found["expert"]] == [(0, ((3, 6),))] * 2
