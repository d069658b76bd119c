"""The table in other tools' words: forms, refusals, and the command that prints them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import Shape, newer_name
from hypothesis import given
from hypothesis import strategies as st
from launching import ROOT
from published import PUBLISHED

from policies.errors import UserError
from policies.export import (
    DIALECTS,
    _deepspeed_shares,
    _names,
    injection_policy,
    partition_config,
    row_parallel,
    tp_plan,
)
from policies.families.qwen2_vl import POLICY, TABLE, geometry
from policies.rules import Head, Replicated, expand

SEVEN = geometry(PUBLISHED["7b"].config())
TWO = geometry(PUBLISHED["2b"].config())
CUT = {claim.module for claim in TABLE if not isinstance(claim.rule, Replicated)}
VISION = {"visual.blocks.*.attn.qkv", "visual.blocks.*.attn.proj"}
MERGER = {"visual.merger.mlp.0", "visual.merger.mlp.2"}


def specs(config: dict) -> dict[str, dict]:
    """Published pattern -> what it becomes."""
    return {s["patterns"][0].strip("^$").replace("\\.", ".").replace("\\d+", "*").removesuffix(".weight"):
            {k: v for k, v in s.items() if k not in ("patterns", "model_types")}
            for s in config["partition_config"]["layer_specs"]}


def test_row_parallel_lists_the_row_parallel_layers_of_every_stack():
    assert row_parallel(POLICY) == {"model.layers": ("self_attn.o_proj", "mlp.down_proj"),
                                    "visual.blocks": ("attn.proj", "mlp.fc2")}


def test_injection_policy_is_the_text_stack_alone():
    translation = injection_policy(POLICY, SEVEN, 4)
    assert translation.words == {"model.layers": ("self_attn.o_proj", "mlp.down_proj")}
    assert translation.whole.keys() == {m for m in CUT if m.startswith("visual.")} | {"model.embed_tokens"}


def test_partition_config_of_the_7b():
    translation = partition_config(POLICY, SEVEN, 4)
    assert translation.words["autotp_size"] == 4
    column, row, skip = ({"partition_type": t} for t in ("column", "row", "skip"))
    text = {f"model.layers.*.self_attn.{n}_proj": row if n == "o" else column for n in "qkvo"}
    text |= {f"model.layers.*.mlp.{n}_proj": row if n == "down" else column for n in ("gate", "up", "down")}
    assert specs(translation.words) == text | {
        "model.embed_tokens": skip, "lm_head": {**column, "gather_output": True},
        "visual.blocks.*.attn.qkv": {**column, "shape": [3, -1], "partition_dim": 0},
        "visual.blocks.*.attn.proj": row, "visual.blocks.*.mlp.fc1": column, "visual.blocks.*.mlp.fc2": row,
        "visual.merger.mlp.0": skip, "visual.merger.mlp.2": skip}
    assert translation.whole.keys() == {"model.embed_tokens"} | MERGER


def test_partition_config_leaves_a_tied_head_and_misaligned_vision_heads_whole():
    assert "tied" in partition_config(POLICY, TWO, 2).whole["lm_head"]
    odd = geometry(Shape(heads=8, kv_heads=4, v_heads=6, v_head_dim=8).config())
    whole = partition_config(POLICY, odd, 3).whole
    assert whole.keys() >= VISION
    assert "24, 12, 12 elements, for 2, 2, 2 heads" in whole["visual.blocks.*.attn.qkv"]
    assert not partition_config(POLICY, odd, 2).whole.keys() & VISION  # 24 and 24: three heads each


def test_tp_plan_of_the_7b():
    translation = tp_plan(POLICY, SEVEN, 4)
    text, blocks = "model.language_model.layers.*", "model.visual.blocks.*"
    assert translation.words == {
        "model.language_model.embed_tokens": "embedding_rowwise", "lm_head": "colwise_gather_output",
        **{f"{text}.self_attn.{n}_proj": "rowwise" if n == "o" else "colwise" for n in "qkvo"},
        f"{text}.mlp.gate_proj": "colwise", f"{text}.mlp.up_proj": "colwise", f"{text}.mlp.down_proj": "rowwise",
        f"{blocks}.attn.qkv": "colwise_gather_output", f"{blocks}.attn.proj": "rowwise_split_input",
        f"{blocks}.mlp.fc1": "colwise", f"{blocks}.mlp.fc2": "rowwise"}
    assert translation.whole.keys() == MERGER


@pytest.mark.parametrize("g", [SEVEN, TWO], ids=["7b", "2b"])
def test_every_cut_row_is_named_or_left_whole_with_a_reason(g):
    newer = {_names(POLICY, module)[-1]: module for module in CUT}
    translation = {module for module, words in specs(partition_config(POLICY, g, 2).words).items()
            if words["partition_type"] != "skip"}
    cut = {"partition_config": translation, "tp_plan": {newer[m] for m in tp_plan(POLICY, g, 2).words},
           "injection_policy": {m for m in CUT if m.startswith("model.layers")} | {"lm_head"}}  # cut unasked
    for dialect, say in DIALECTS.items():
        whole = say(POLICY, g, 2).whole
        assert cut[dialect] | whole.keys() == CUT and not cut[dialect] & whole.keys(), dialect
        assert all(len(why) > 20 or "tied" in why for why in whole.values())


@pytest.mark.parametrize("newer", [False, True], ids=["published", "newer"])
def test_partition_config_matches_each_linear_once_under_either_name_as_deepspeed_matches(newer):
    from deepspeed.module_inject.autotp_config import AutoTPConfig

    shape = Shape(layers=12, v_layers=11)  # numbers of two digits
    g = geometry(shape.config())
    config = AutoTPConfig.from_dict(partition_config(POLICY, g, 2).words["partition_config"])
    rows = {module: claim for claim in TABLE for module in expand(claim.module, g.layers)}
    assert not config.use_default_specs and config.strict_mode
    for name in shape.tensors():
        module, suffix = name.rsplit(".", 1)
        found = [s for s in config.layer_specs if s.matches(newer_name(name) if newer else name, "qwen2_vl")]
        cut = suffix == "weight" and not isinstance(rows[module].rule, Replicated)
        assert len(found) == cut, name
    beside = ("model.layers.0.mlp.gate_proj.weight.scale", "x.lm_head.weight", "model.layers.x.mlp.up_proj.weight",
              "visual.blocks.0.mlp.gate_proj.weight", "model.layers.0.mlp.fc1.weight",
              "model_layers.0.mlp.up_proj.weight")
    assert not [n for n in beside if config.find_matching_spec(n, "qwen2_vl")]
    assert not config.find_matching_spec("lm_head.weight", "qwen3_vl")


@given(st.integers(1, 64), st.integers(1, 32), st.integers(1, 16), st.integers(1, 12))
def test_shares_are_what_deepspeed_gives(heads, head_dim, kv_heads, tp):
    from deepspeed.module_inject.tp_shard import AutoTPMeta, get_shard_size_list

    for total in (heads, heads * head_dim):
        theirs = get_shard_size_list(total, tp, AutoTPMeta(num_kv_heads=kv_heads), "visual.blocks.0.attn.qkv")
        assert _deepspeed_shares(total, kv_heads, tp) == theirs


@pytest.mark.parametrize(("dialect", "g", "tp", "parts"), [
    ("injection_policy", TWO, 4, ["KV replication: 2 KV heads for 4 ranks", "2 would have none", "can say: 2."]),
    ("partition_config", TWO, 3, ["KV replication: 2 KV heads for 3 ranks", "6 query heads", "can say: 2."]),
    ("tp_plan", TWO, 4, ["KV replication: 2 KV heads for 4 ranks", "2 x 128 rows", "can say: 2."]),
    ("tp_plan", SEVEN, 3, ["uneven heads: 4 KV heads for 3 ranks", "can say: 2, 4."]),
    ("partition_config", SEVEN, 7, ["4 KV heads for 7 ranks", "can say: 4."]),
], ids=["injection_policy-2b", "partition_config-2b", "tp_plan-2b", "tp_plan-7b", "partition_config-7b"])
def test_a_refusal_says_what_with_the_numbers_and_what_to_do(dialect, g, tp, parts):
    with pytest.raises(UserError) as caught:
        DIALECTS[dialect](POLICY, g, tp)
    message = str(caught.value)
    for part in (f"qwen2_vl as {dialect} at tp_size {tp}", "adapter.init_inference", *parts):
        assert part in message, message


@pytest.mark.parametrize("dialect", DIALECTS)
def test_all_problems_at_once(dialect):
    odd = geometry(Shape(heads=28, kv_heads=4).config() | {"num_key_value_heads": 5, "intermediate_size": 20})
    with pytest.raises(UserError) as caught:
        DIALECTS[dialect](POLICY, odd, 40)
    message = str(caught.value)
    assert all(p in message for p in ("each rank needs a query head", "not a multiple of num_key_value_heads 5",
                                      "mlp has only 20 elements", "5 KV heads for 40 ranks", "can say: none"))


@given(st.integers(1, 8), st.integers(1, 4), st.integers(-1, 40))
def test_which_sizes_are_refused(kv_heads, group, tp):
    heads = geometry(Shape(heads=kv_heads * group, kv_heads=kv_heads).config())
    can = {"tp_plan": tp > 0 and kv_heads % tp == 0} | dict.fromkeys(
        ("injection_policy", "partition_config"), 0 < tp <= kv_heads)
    for dialect, say in DIALECTS.items():
        try:
            translation = say(POLICY, heads, tp)
        except UserError:
            assert not can[dialect]
        else:
            assert can[dialect] and json.loads(json.dumps(translation.words))


def test_a_stack_without_a_fused_qkv_can_be_injected():
    """The reason is the rule, not the name of a encoder."""
    table = tuple(replace(c, rule=TABLE[2].rule) if c.module.endswith("attn.qkv") else c for c in TABLE)
    assert injection_policy(replace(POLICY, table=table), SEVEN, 2).words.keys() == {"model.layers", "visual.blocks"}


def test_the_head_is_never_left_unsaid():
    assert [c.module for c in TABLE if isinstance(c.rule, Head)] == ["lm_head"]
    assert _names(POLICY, "lm_head") == ["lm_head"]
    assert all(POLICY.published(name) == claim.module for claim in TABLE for name in _names(POLICY, claim.module))


# ---- python -m policies


def command(*args: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "policies", *args]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=30)


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["7b"].config()))
    return tmp_path


def test_all_three_are_printed_and_a_refusal_is_one_of_the_answers(model):
    done = command(str(model), "--tp-size", "3")
    answer = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "") and answer.keys() == DIALECTS.keys()
    assert answer["partition_config"]["words"] == partition_config(POLICY, SEVEN, 3).words
    assert answer["injection_policy"]["whole"] == injection_policy(POLICY, SEVEN, 3).whole
    assert answer["tp_plan"].keys() == {"refused"} and "uneven heads" in answer["tp_plan"]["refused"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_alone_is_printed_ready_for_use_and_what_stays_whole_is_reported(model, dialect):
    done, translation = command(str(model), "--dialect", dialect, "--tp-size", "4"), DIALECTS[dialect](POLICY, SEVEN, 4)
    assert done.returncode == 0 and json.loads(done.stdout) == json.loads(json.dumps(translation.words))
    assert all(module in done.stderr for module in translation.whole)
    assert done.stderr.count("\n") == len(translation.whole)


def test_a_named_dialect_that_refuses_ends_with_2(model):
    done = command(str(model), "--dialect", "tp_plan", "--tp-size", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: qwen2_vl as tp_plan at tp_size 3")


BAD_FILES = {
    "no_file": None, "not_json": b"{", "a_list": b"[1]", "not_text": b"\xff\xfe\x00", "empty": b"",
    "deep": b"[" * 100_000, "unknown_type": b'{"model_type": "qwen2_v1"}', "no_geometry": b'{"model_type": "qwen2_vl"}',
    "fifo": "fifo", "directory": "directory", "large": "large", "endless": "/dev/zero",
    "long_number": b'{"model_type": ' + b"9" * 9999 + b"}",
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_config_is_a_message_and_2(tmp_path, what):
    file, content = tmp_path / "config.json", BAD_FILES[what]
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "fifo":
        os.mkfifo(file)
    elif content == "directory":
        file.mkdir()
    elif content == "large":
        with file.open("wb") as stream:
            stream.truncate(1 << 40)
    elif content:
        file.symlink_to(content)
    done = command(str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: ")
    assert "config.json" in done.stderr and "Traceback" not in done.stderr and len(done.stderr) < 2000


@pytest.mark.parametrize("args", [
    [], ["{}", "--tp-size", "two"], ["{}", "--dialect", "megatron"], ["{}", "--tp-size", "0", "--dialect", "tp_plan"],
    ["{}/none"], ["a\udcff"],
], ids=repr)
def test_bad_arguments_are_a_message_and_2(model, args):
    done = command(*(a.replace("{}", str(model)) for a in args))
    assert (done.returncode, done.stdout) == (2, "") and done.stderr and "Traceback" not in done.stderr


def test_the_policies_import_none_of_the_tools():
    code = ("import sys, policies.__main__; "
            "sys.exit(bool({'torch', 'deepspeed', 'transformers', 'adapter'} & sys.modules.keys()))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
