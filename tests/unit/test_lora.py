"""LoRA adapters: merged as PEFT merges, a slice being the slice of the whole bit for bit; what cannot be is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import Shape, make_checkpoint, newer_name
from families import make_family
from launching import ROOT
from loras import linears, make_lora
from safetensors.torch import load_file, save_file
from test_checkpoint import cut, whole

from adapter.checkpoint.lora import MergedCheckpoint, merge
from adapter.checkpoint.safetensors import Checkpoint
from adapter.checkpoint.sharded import MANIFEST
from adapter.commands.shard import write_shards
from adapter.config.load import from_dict, load_config
from adapter.health.job_facts import facts_of_config
from adapter.kernels.linear import Quantised, make_weight
from adapter.planning.load import checked_plan, make_plan
from adapter.requests import one_process
from adapter.requests.identity import digests
from adapter.verify.reference import read_tensor
from policies.errors import UserError
from policies.rules import TensorSlice

SMALL = Shape(heads=6, kv_heads=2, head_dim=4, layers=1, mlp=40, vocab=37, v_heads=3, v_head_dim=4, v_layers=1)
Q, QKV = "model.layers.0.self_attn.q_proj", "visual.blocks.0.attn.qkv"
MODULES = linears(SMALL.tensors())


def opened(model: Path, *adapters: Path, tp: int = 1, dtype: str = "float32") -> tuple:
    plan, checkpoint = checked_plan(model, tp, dtype, adapters=adapters)
    assert isinstance(checkpoint, MergedCheckpoint)
    return plan, checkpoint


def read_all(model: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    plan, checkpoint = opened(model, *adapters)
    return {f"{m}.{s}": checkpoint.read(f"{m}.{s}", plan.slice(m, s, 0).whole) for m, s in plan.parameters()}


# Arithmetic

@pytest.mark.parametrize("r", [1, 3, 8, 64, 300])
def test_no_order_of_summation_changes_a_bit(r):
    """As if another shape, library or processor had added. Of weights that cancel the update the last bits are seen:
    with a plain float64 product hundreds of elements differ."""
    torch.manual_seed(r)
    weight, b, a = torch.randn(60, 70), torch.randn(60, r) * torch.randn(60, r).exp(), torch.randn(r, 70)
    order, opposite = torch.randperm(r), -(1.7 * (b.double() @ a.double())).float()
    for base in (weight, opposite):
        merged = merge(base, [(b, a, 1.7)], torch.float32)
        assert torch.equal(merged, merge(base, [(b[:, order], a[order], 1.7)], torch.float32))
    merged = merge(weight, [(b, a, 1.7)], torch.float32)
    exact = weight.double() + 1.7 * (b.double() @ a.double())
    scale = b.abs().amax(1, keepdim=True) * a.abs().amax(0) * r + exact.abs()
    assert ((merged - exact).abs() / scale).max() < 2 ** -23


@pytest.mark.parametrize("tp", [2, 3, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_slice_is_the_slice_of_the_merged_whole(tmp_path, tp, dtype):
    """Of all rules: columns, rows, fused q, k and v, the vocabulary. By either reader, from files in either dtype."""
    model = make_checkpoint(tmp_path / "m", SMALL, getattr(torch, dtype))
    adapters = make_lora(tmp_path / "a", MODULES, r=5), make_lora(tmp_path / "b", MODULES, 3, torch.bfloat16, seed="b")
    plan, checkpoint = opened(model, *adapters, tp=tp, dtype=dtype)
    base = whole(model)
    for module, suffix in plan.parameters():
        name = f"{module}.{suffix}"
        expected = checkpoint.read(name, TensorSlice(tuple(base[name].shape)))
        assert torch.equal(expected, base[name]) == (module not in MODULES or suffix == "bias"), name
        for rank in range(tp):
            part = plan.slice(module, suffix, rank)
            mine = checkpoint.read(name, part)
            assert mine.dtype == getattr(torch, dtype) and torch.equal(mine, cut(expected, part)), (name, rank)
            assert torch.equal(mine, read_tensor(checkpoint, name, part)), name


def test_only_the_rows_and_columns_of_the_slice_are_read(tmp_path):
    model, adapter = make_checkpoint(tmp_path / "m", SMALL), make_lora(tmp_path / "a", MODULES, r=5)
    plan, checkpoint = opened(model, adapter, tp=2)
    for name, inputs, outputs in (("model.layers.0.mlp.gate_proj", 24, 20), ("model.layers.0.mlp.down_proj", 20, 24)):
        before = checkpoint.bytes_read
        checkpoint.read(f"{name}.weight", plan.slice(name, "weight", 1))
        assert checkpoint.bytes_read - before == 4 * (inputs * outputs + 5 * (inputs + outputs)), name


# PEFT is the oracle

PEFT = {  # what LoraConfig is given
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    "rank-stabilised": {"r": 5, "lora_alpha": 7, "use_rslora": True, "fan_in_fan_out": True,
                        "target_modules": ["q_proj", "o_proj", "qkv", "lm_head"]},
    "patterns": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear",
                 "rank_pattern": {"q_proj": 2, r"layers\.1\..*\.down_proj": 7, "attn.qkv": 3},
                 "alpha_pattern": {"^.*visual.*": 9, "k_proj": 1.5}},
}


@pytest.mark.parametrize(("family", "how"), [("qwen2_vl", how) for how in PEFT] + [
    ("qwen2_5_vl", "plain"), ("qwen3_vl", "patterns")])
def test_merged_is_what_peft_merges(tmp_path, family, how):
    import peft
    import transformers

    model = make_checkpoint(tmp_path / "m", replace(SMALL, layers=2)) if family == "qwen2_vl" else \
        make_family(tmp_path / "m", family)
    policy = checked_plan(model, 1, "float32")[0].policy
    theirs = getattr(transformers, policy.model_class).from_pretrained(model, torch_dtype=torch.float32)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**PEFT[how], init_lora_weights=False))
    for name, parameter in theirs.named_parameters():
        if name.endswith("lm_head.base_layer.weight"):  # PEFT saves the head's own weight too, and loads it
            parameter.data.mul_(1.5)
    theirs.save_pretrained(tmp_path / "a")
    merged = {policy.published(n): t for n, t in theirs.merge_and_unload().state_dict().items()}
    base, ours = whole(model) if family == "qwen2_vl" else {}, read_all(model, tmp_path / "a")
    for name, tensor in ours.items():
        assert torch.allclose(tensor, merged[name], rtol=1e-6, atol=1e-6), (name, (tensor - merged[name]).abs().max())
        assert not base or torch.equal(tensor, base[name]) or name.endswith(".weight"), name
    updated = checked_plan(model, 1, "float32", adapters=[tmp_path / "a"])[1].adapters[0].updates
    assert any("visual" in name for name in updated) and any("layers" in name for name in updated)


def test_names_of_old_and_new_releases_are_the_same_modules(tmp_path):
    model = make_checkpoint(tmp_path / "m", SMALL)
    old = make_lora(tmp_path / "old", MODULES)
    new = make_lora(tmp_path / "new", MODULES, rename=newer_name)
    assert load_file(old / "adapter_model.safetensors").keys() != load_file(new / "adapter_model.safetensors").keys()
    assert all(map(torch.equal, read_all(model, old).values(), read_all(model, new).values()))


def test_adapters_are_applied_one_after_the_other(tmp_path):
    model = make_checkpoint(tmp_path / "m", SMALL)
    a, b = make_lora(tmp_path / "a", MODULES), make_lora(tmp_path / "b", {Q: MODULES[Q]}, seed="b")
    base, one, both = whole(model), read_all(model, a), read_all(model, a, b)
    assert torch.allclose(both[f"{Q}.weight"], one[f"{Q}.weight"] + read_all(model, b)[f"{Q}.weight"] -
                          base[f"{Q}.weight"], atol=1e-5)
    assert {name for name in one if not torch.equal(one[name], both[name])} == {f"{Q}.weight"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_process_has_the_weights_of_the_ranks(tmp_path, dtype):
    """From bfloat16 files: in float32 the sum is not rounded to what the file is in."""
    import transformers

    model = make_checkpoint(tmp_path / "m", SMALL, torch.bfloat16)
    adapter = make_lora(tmp_path / "a", MODULES)
    config = from_dict({"model": {"path": str(model), "dtype": dtype, "adapters": [str(adapter)]}})
    one = transformers.Qwen2VLForConditionalGeneration.from_pretrained(model, torch_dtype=config.model.torch_dtype)
    plan, checkpoint = opened(model, *config.model.adapters, tp=2, dtype=dtype)
    one_process._merge_adapters(one, model, config.model, plan.policy)
    held = {plan.policy.published(name): parameter for name, parameter in one.named_parameters()}
    for module, suffix in plan.parameters():
        part = plan.slice(module, suffix, 1)
        mine = checkpoint.read(f"{module}.{suffix}", part).to(config.model.torch_dtype)
        assert torch.equal(mine, cut(held[f"{module}.{suffix}"], part)), module
        rounded = torch.equal(mine, mine.bfloat16().to(mine.dtype))
        assert rounded == (dtype == "bfloat16" or module not in MODULES or suffix == "bias"), module


# What is refused

CONFIGS = {  # changes of adapter_config.json -> words of the message
    "another method": ({"peft_type": "IA3"}, ["peft_type = 'IA3'", "merge_and_unload", "model.path"]),
    "no method": ({"peft_type": None}, ["peft_type = None"]),
    "DoRA": ({"use_dora": True}, ["use_dora", "merge_and_unload"]),
    "bias": ({"bias": "all"}, ["bias = 'all'"]), "bias of B": ({"lora_bias": True}, ["lora_bias"]),
    "modules_to_save": ({"modules_to_save": ["merger"]}, ["modules_to_save = ['merger']", "whole modules"]),
    "tokens": ({"trainable_token_indices": [3]}, ["trainable_token_indices"]),
    "experts": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, ["target_parameters", "experts"]),
    "replication": ({"layer_replication": [[0, 2]]}, ["layer_replication"]),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, ["init_lora_weights = 'pissa_niter_4'", "initialisation"]),
    "from tomorrow": ({"use_tomorrow": {"a": 1}}, ["use_tomorrow", "does not know"]),
    "r as text": ({"r": "4"}, ["r = '4'"]), "no r": ({"r": None}, ["r = None"]), "r of 0": ({"r": 0}, ["r = 0"]),
    "alpha NaN": ({"lora_alpha": float("nan")}, ["lora_alpha = nan"]),
    "rank": ({"r": 8}, [f"{Q}.lora_A.weight' has shape [4, 24]", "r = 8", "make [8, 24]"]),
    "a slow pattern": ({"rank_pattern": {"(a+)+b": 3}}, ["(a+)+b", "names of modules"]),
    "a broken pattern": ({"alpha_pattern": {"(": 3}}, ["'('"]),
    "two things": ({"use_dora": True, "bias": "all"}, ["use_dora", "bias = 'all'"]),
}
HALF = f"base_model.model.{Q}.lora_A.weight"
FILES = {  # a function of the tensors -> words of the message
    "no such module": (lambda t: {n.replace("layers.0", "layers.7"): v for n, v in t.items()},
                       ["model.layers.7.self_attn.q_proj", "not", "this model"]),
    "B missing": (lambda t: {HALF: t[HALF]}, [HALF, f"{Q}.lora_B.weight is not"]),
    "another width": (lambda t: t | {HALF: t[HALF][:, :20].contiguous()}, ["[4, 20]", "[24, 24]", "[4, 24]"]),
    "another dtype": (lambda t: t | {HALF: t[HALF].double()}, ["F64", "F32, F16, BF16"]),
    "DoRA's": (lambda t: t | {f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(24)},
               ["lora_magnitude_vector", "DoRA", "merge_and_unload"]),
    "an embedding": (lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 37)},
                     ["lora_embedding_A", "embedding", "merge_and_unload"]),
    "a whole module": (lambda t: t | {"base_model.model.visual.merger.ln_q.weight": torch.ones(12)}, ["ln_q.weight"]),
    "a norm": (lambda t: t | {f"base_model.model.model.norm.lora_{h}.weight": torch.ones(4, 4) for h in "AB"},
               ["'model.norm' is no linear layer"]),
    "the same under two names": (lambda t: t | {n.replace("model.layers", "model.language_model.layers"): v.clone()
                                                for n, v in t.items()}, ["same module"]),
    "nothing": (lambda t: {}, ["holds no tensor"]),
}


def complaint(model: Path, *adapters: Path, **more: object) -> str:
    with pytest.raises(UserError) as caught:
        checked_plan(model, 1, "float32", adapters=adapters, **more)
    return str(caught.value)


@pytest.fixture
def model(tmp_path) -> Path:
    return make_checkpoint(tmp_path / "m", SMALL)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_be_merged(tmp_path, model, case):
    change, words = CONFIGS[case]
    adapter = make_lora(tmp_path / "a", {Q: MODULES[Q]})
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    message = complaint(model, adapter)
    assert all(word in message for word in [str(tmp_path / "a" / "adapter_"), *words]), message


@pytest.mark.parametrize("case", FILES)
def test_tensors_that_do_not_fit(tmp_path, model, case):
    change, words = FILES[case]
    adapter = make_lora(tmp_path / "a", {Q: MODULES[Q]})
    save_file(change(load_file(adapter / "adapter_model.safetensors")), adapter / "adapter_model.safetensors")
    message = complaint(model, adapter)
    assert all(word in message for word in [f"{adapter}/adapter_model.safetensors: ", *words]), message


def test_a_directory_that_is_no_adapter(tmp_path, model):
    assert "adapter_config.json: missing" in complaint(model, model)
    adapter = make_lora(tmp_path / "a", {Q: MODULES[Q]})
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "run code" in complaint(model, adapter)
    (adapter / "adapter_config.json").write_text("[")
    assert "cannot be read as JSON" in complaint(model, adapter)


@pytest.mark.parametrize("name", ["lm_head.lora_A.weight", "model.embed_tokens.lora_embedding_A"])
def test_one_of_a_tied_pair(tmp_path, name):
    model = make_checkpoint(tmp_path / "m", replace(SMALL, tied=True))
    adapter = make_lora(tmp_path / "a", {Q: MODULES[Q]})
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{name}": torch.ones(4, 24)}, file)
    message = complaint(model, adapter)
    assert "tied to" in message and "tie_word_embeddings false" in message and name in message, message


def test_a_quantised_base(tmp_path, model):
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (model / "config.json").write_text(json.dumps(config))
    assert "quantization_config" in complaint(model, make_lora(tmp_path / "a", {Q: MODULES[Q]}))


# Where they are named, and what knows of them

def test_paths_are_relative_to_who_states_them(tmp_path, model, monkeypatch):
    make_lora(tmp_path / "a", {Q: MODULES[Q]})
    (tmp_path / "c.yaml").write_text("model: {path: m, adapters: [a]}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for overrides in ([], ["model.path=../m"], ["model.adapters=[../a]"], ["model={path: ../m, adapters: [../a]}"]):
        assert load_config(tmp_path / "c.yaml", overrides).model.adapters == (tmp_path / "a",), overrides
    (tmp_path / "link").symlink_to("a")
    for stated, words in (("[a, b]", "no such directory"), ("[a, ./a]", "the same adapter twice"), ("a", "a list"),
                          ("[a, link]", "the same adapter twice"), ("[3]", "LoRA adapter is needed")):
        (tmp_path / "c.yaml").write_text(f"model: {{path: m, adapters: {stated}}}")
        with pytest.raises(UserError, match=words):
            load_config(tmp_path / "c.yaml")


def test_what_depends_on_an_adapters_content(tmp_path, model):
    """The digest beside an answer, and what ranks compare before they start: not the directory's name or place."""
    def seen(*adapters: Path) -> tuple:
        config = from_dict({"model": {"path": str(model), "adapters": list(map(str, adapters))},
                            "requests": [{"prompt": "What?"}]})
        return digests(config)["1"], facts_of_config(config)["model.adapters"]

    module = {Q: MODULES[Q]}
    a, copy = (make_lora(tmp_path / name, module) for name in ("a", "copy"))
    b, other = make_lora(tmp_path / "b", module, seed="b"), make_lora(tmp_path / "other", module, lora_alpha=9)
    assert seen(a) == seen(copy)
    everything = [seen(), seen(a), seen(b), seen(other), seen(a, b), seen(b, a)]
    assert [len(set(column)) for column in zip(*everything, strict=True)] == [6, 6]


def test_a_plan_needs_no_torch_and_says_what_is_merged(tmp_path, model):
    make_lora(tmp_path / "a", {Q: MODULES[Q], QKV: MODULES[QKV]})
    (tmp_path / "c.yaml").write_text("{model: {path: m, adapters: [a]}, tensor_parallel: {tp_size: 2}}")
    script = ("import sys; from adapter.commands.plan import *; import atexit\n"
              "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); start()")
    done = subprocess.run([sys.executable, "-c", script, "--config", tmp_path / "c.yaml"], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stderr.endswith("False\n"), done.stderr
    assert f"adapter {tmp_path / 'a'}: merged into 2 weights, r 4" in done.stdout


# Shards

@pytest.mark.parametrize("form", ["dense", "int8"])
def test_shards_have_them_merged_and_say_so(tmp_path, form):
    grouped = Shape(heads=4, kv_heads=2, head_dim=64, layers=1, mlp=256, v_layers=1)
    model, out = make_checkpoint(tmp_path / "m", grouped), tmp_path / "shards"
    modules = linears(grouped.tensors())
    a, b = make_lora(tmp_path / "a", modules), make_lora(tmp_path / "b", {Q: modules[Q]}, seed="b")
    plan, checkpoint = checked_plan(model, 2, "float32", form=form, adapters=[a, b])
    write_shards(plan, checkpoint, out)
    shards = checked_plan(out, 2, "float32", form=form, adapters=[a, b])[1]
    held = shards.load(1)
    for module in modules:
        name = f"{module}.weight"
        whole_weight = checkpoint.read(name, TensorSlice(modules[module]))
        mine = make_weight(cut(whole_weight, plan.slice(module, "weight", 1)), plan.format_of(module))
        assert isinstance(mine, Quantised) == isinstance(held[name], Quantised) == bool(plan.format_of(module).bits)
        pair = [t.dense() if isinstance(t, Quantised) else t for t in (held[name], mine)]
        assert torch.equal(*pair), name
    other = make_lora(tmp_path / "other" / "a", modules, lora_alpha=9)
    for adapters, named in (([], "[]"), ([a], "['a']"), ([b, a], "['b', 'a']"), ([other, b], "contents are others")):
        message = str(make_plan(out, 2, "float32", form=form, adapters=adapters)[2])
        assert MANIFEST in message and "['a', 'b'] merged" in message and named in message, message


def test_shards_without_adapters_are_refused_for_a_config_with_one(tmp_path, model):
    plan, checkpoint = checked_plan(model, 2, "float32")
    assert type(checkpoint) is Checkpoint
    write_shards(plan, checkpoint, tmp_path / "shards")
    adapter = make_lora(tmp_path / "a", {Q: MODULES[Q]})
    assert make_plan(tmp_path / "shards", 2, "float32")[2] == []
    assert "have the adapters [] merged" in str(make_plan(tmp_path / "shards", 2, "float32", adapters=[adapter])[2])
