"""Quantised checkpoints: what is read of AWQ, GPTQ and FP8 files is what they stand for, whole and by any rank's slice.

The files are written by tests/quantised.py, which says in another way than the reader what they stand for; FP8 is held
against Transformers' own decoder as well.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from families import make_family
from launching import ROOT
from published import PUBLISHED
from quantised import KINDS, awq, fp8, gptq, kind, quantised, sparse_awq
from safetensors.torch import load_file, save_file
from test_checkpoint import cut

from adapter.checkpoint.plain import read_plain
from adapter.checkpoint.quantised import Awq, Fp8, Gptq, form_of
from adapter.checkpoint.quantised import awq as awq_module
from adapter.planning.load import checked_plan, make_plan
from adapter.requests import identity
from policies.errors import UserError
from policies.rules import TensorSlice

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SIZES = (1, 2, 3, 4, 8)
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dense")
    made = {f: make_family(root / f, f, intermediate_size=208, num_hidden_layers=2) for f in FAMILIES[1:]}
    return {"qwen2_vl": make_checkpoint(root / "qwen2_vl"), **made}


@pytest.fixture(scope="module")
def written(dense, tmp_path_factory):
    """(family, kind) -> the directories of the quantised model and of what it stands for."""
    root, made = tmp_path_factory.mktemp("quantised"), {}

    def get(family: str, name: str) -> tuple[Path, Path]:
        if (family, name) not in made:
            out, meant = root / f"{family}-{name}", root / f"{family}-{name}-meant"
            made[family, name] = quantised(dense[family], out, KINDS[name], decoded=meant), meant
        return made[family, name]
    return get


def tensors_of(directory: Path, plan) -> dict[str, torch.Tensor]:
    return {plan.policy.published(n): t for f in directory.glob("*.safetensors") for n, t in load_file(f).items()}


DEFAULT = {(FAMILIES[i % 3], name) for i, name in enumerate(KINDS)}  # every kind once


@pytest.mark.parametrize(("family", "name"), [
    pytest.param(family, name, marks=[] if (family, name) in DEFAULT else pytest.mark.sweep)
    for family in FAMILIES for name in KINDS])
def test_every_slice_is_that_of_what_the_file_stands_for(written, family, name):
    """Bit for bit, at sizes that cut heads, words, groups and blocks; the second decoder agrees."""
    directory, meant = written(family, name)
    inside_a_group = 0
    for tp in SIZES:
        plan, checkpoint = checked_plan(directory, tp, "float32")
        tensors = tensors_of(meant, plan)
        for rank in range(tp):
            for module, suffix in plan.parameters():
                part, parameter = plan.slice(module, suffix, rank), f"{module}.{suffix}"
                got = checkpoint.read(parameter, part)
                assert got.is_contiguous() and torch.equal(got, cut(tensors[parameter], part)), (parameter, tp, rank)
                inside_a_group += part.dim == 1 and part.ranges[0][0] % 16 > 0
                if tp == 1:
                    assert torch.equal(read_plain(checkpoint, parameter), tensors[parameter]), parameter
    assert inside_a_group > 8
    assert sum(map(checkpoint.is_quantised, tensors)) == 7 * 2, "seven matrices of two layers"


def test_a_width_of_231_groups():
    """29,568 inputs, of the 72Bs, divide into no two equal parts of whole groups of 128; decoded in several parts."""
    weight, shape = torch.randn(48, 29568, generator=torch.Generator().manual_seed(0)), (48, 29568)
    for form, (stored, meant) in ((Awq(4, 128), awq(weight, 128)), (Gptq(4, 128, True), gptq(weight, 128)),
                                  (Fp8(8, 128, 128), fp8(weight, (128, 128)))):
        for tp in (2, 4, 8):
            bounds = [29568 * r // tp for r in range(tp + 1)]
            read = [form.read(TensorSlice(shape, 1, (pair,)), lambda ending, part, s=stored: cut(s[ending], part))
                    for pair in pairwise(bounds)]
            assert torch.equal(torch.cat(read, 1), meant), (form, tp)
        some = form.read(TensorSlice(shape, 0, ((5, 43),)), lambda ending, part, s=stored: cut(s[ending], part))
        assert torch.equal(some, meant[5:43]), form


@pytest.mark.parametrize(("name", "mlp"), [("2b", 8960), ("7b", 18944), ("72b", 29568), ("72b", 29696)])
def test_published_sizes(tmp_path, name, mlp):
    """The 72Bs' AWQ files were published with a padded MLP; files of others have 231 groups. All tp sizes take both."""
    directory = sparse_awq(tmp_path / "awq", replace(PUBLISHED[name], mlp=mlp))
    plan, checkpoint = checked_plan(directory, 8, "bfloat16")
    assert plan.sizes_that_work() == [n for n in range(1, PUBLISHED[name].heads + 1)
                                      if not plan.policy.problems(plan.geometry, n)]
    part = plan.slice("model.layers.0.mlp.down_proj", "weight", 3)
    assert checkpoint.read("model.layers.0.mlp.down_proj.weight", part).shape == part.local_shape
    start, stop = part.ranges[0]
    groups = -(-stop // 128) - start // 128
    assert checkpoint.bytes_read == part.shape[0] * ((stop - start) // 2 + groups * (2 + 0.5))


def test_only_the_enclosing_groups_are_read():
    asked = {}

    def fetch(ending, part):
        asked[ending] = part
        return cut(stored[ending], part)
    stored, _ = awq(torch.randn(64, 512), 128)
    Awq(4, 128).read(TensorSlice((64, 512), 1, ((130, 200),)), fetch)
    ranges = {ending: part.ranges[0] for ending, part in asked.items()}
    assert ranges == {"qweight": (130, 200), "qzeros": (1, 2), "scales": (1, 2)}
    Awq(4, 128).read(TensorSlice((64, 512), 0, ((12, 20),)), fetch)
    ranges = {ending: part.ranges[0] for ending, part in asked.items()}
    assert ranges == {"qweight": (1, 3), "qzeros": (1, 3), "scales": (12, 20)}


def test_fp8_as_transformers_decodes_it(written):
    fp8_of = pytest.importorskip("transformers.integrations.finegrained_fp8")
    directory, _ = written("qwen3_vl", "fp8")
    _, checkpoint = checked_plan(directory, 1, "float32")
    decode, quantised_weights = fp8_of.Fp8Dequantize(None), 0
    for name, info in checkpoint.tensors.items():
        if name.endswith(".weight") and checkpoint.is_quantised(name):
            stored = load_file(info.file)
            theirs = decode._dequantize_one(stored[info.name], stored[f"{info.name}_scale_inv"], torch.float32)
            assert torch.equal(checkpoint.read(name, TensorSlice(info.shape)), theirs), name
            quantised_weights += 1
    assert quantised_weights == 14


def test_zeros_of_version_one_borrow_as_gptqmodel_writes_them():
    """A zero of 0 is stored as 15 and takes 1 from the next field: adding 1 to each field alone would be wrong."""
    weight = torch.rand(16, 32) + 0.1  # nothing below zero
    one, meant = gptq(weight, 16, sym=False)
    two, same = gptq(weight, 16, sym=False, v2=True)
    assert torch.equal(meant, same) and int(two["qzeros"].abs().sum()) == 0 and int(one["qzeros"][0, 0]) == -0x11111111
    for stored, form in ((one, Gptq(4, 16, True)), (two, Gptq(4, 16, False))):
        assert torch.equal(form.read(TensorSlice((16, 32)), lambda ending, part, s=stored: s[ending]), meant)


def shifted(ending: str):
    """A fault: every group or block has the scale of its neighbour."""
    def plant(form, patch):
        read = type(form).read
        patch.setattr(type(form), "read", lambda self, part, fetch: read(
            self, part, lambda e, piece: fetch(e, piece).roll(1, -1 if e == "weight_scale_inv" else 0)
            if e == ending else fetch(e, piece)))
    return plant


@pytest.mark.parametrize(("name", "fault"), [
    ("awq", lambda form, patch: patch.setattr(awq_module, "FIELDS", tuple(range(8)))),
    ("gptq4", lambda form, patch: replace(form, less_one=False)),
    ("gptq8_v2", lambda form, patch: replace(form, less_one=True)),
    ("fp8", shifted("weight_scale_inv")), ("awq", shifted("scales")), ("gptq4_act_order", shifted("scales")),
], ids=["natural order", "zeros one too small", "zeros one too large", "a neighbour's block", "a neighbour's group",
        "a neighbour's group, in order of activations"])
def test_the_second_decoder_sees_a_reader_that_is_wrong(written, monkeypatch, name, fault):
    """What verify's reassembly compares: the plain decoder of whole tensors knows nothing of the slices'."""
    plan, checkpoint = checked_plan(written("qwen2_5_vl", name)[0], 1, "float32")
    part, parameter = plan.slice(DOWN, "weight", 0), f"{DOWN}.weight"
    assert torch.equal(checkpoint.read(parameter, part), read_plain(checkpoint, parameter))
    wrong = replace(checkpoint, form=fault(checkpoint.form, monkeypatch) or checkpoint.form)
    assert not torch.equal(wrong.read(parameter, part), read_plain(checkpoint, parameter))


def change(directory: Path, **changes) -> None:
    """Of the quantization_config."""
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))


def resave(edit):
    def apply(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        name = next(n for n in tensors if "layers.1.mlp.down_proj." in n).rpartition(".")[0]
        edit(tensors, name)
        save_file(tensors, directory / "model.safetensors")
    return apply


BROKEN = {
    "no zeros": ("awq", resave(lambda t, m: t.pop(f"{m}.qzeros")), [f"'{DOWN}.qzeros' [13, 12] is missing"]),
    "no codes": ("gptq4", resave(lambda t, m: t.pop(f"{m}.qweight")), [f"'{DOWN}.qweight' [26, 96] is missing"]),
    "no scales": ("fp8", resave(lambda t, m: t.pop(f"{m}.weight_scale_inv")), ["weight_scale_inv' [6, 13] is missing"]),
    "none of a layer": ("awq", resave(lambda t, m: [t.pop(f"{m}.{p}") for p in ("qweight", "qzeros", "scales")]),
                        [f"'{DOWN}.weight' [96, 208] is missing"]),
    "other groups": ("awq", lambda d: change(d, group_size=8), ["scales' has shape [13, 96]", "says [26, 96] (AWQ"]),
    "other bits": ("gptq4", lambda d: change(d, bits=8), ["qweight' has shape [26, 96]", "[52, 96] (GPTQ, 8 bits"]),
    "other blocks": ("fp8", lambda d: change(d, weight_block_size=[128, 128]), ["weight_scale_inv' has shape [6, 13]"]),
    "codes of 64 bits": ("awq", resave(lambda t, m: t.update({f"{m}.qweight": t[f"{m}.qweight"].long()})),
                         ["qweight' has dtype I64; known: I32 (AWQ"]),
    "scales of 8 bits": ("fp8", resave(lambda t, m: t.update(
        {f"{m}.weight_scale_inv": t[f"{m}.weight_scale_inv"].to(torch.uint8)})), ["dtype U8; known: F16, BF16, F32"]),
    "codes of floats": ("gptq4", resave(lambda t, m: t.update({f"{m}.qweight": t[f"{m}.qweight"].float()})),
                        ["qweight' has dtype F32; known: I32 (GPTQ"]),
    "gemv": ("awq", lambda d: change(d, version="GEMV"), ["AWQ of version 'gemv'", "version gemm"]),
    "three bits": ("gptq4", lambda d: change(d, bits=3), ["GPTQ with 3 bits"]),
    "marlin": ("gptq4", lambda d: change(d, checkpoint_format="marlin"), ["'marlin'", "one kernel"]),
    "bits in words": ("gptq4", lambda d: change(d, bits="four"), ["quantization_config.bits = 'four'"]),
    "no group": ("awq", lambda d: change(d, group_size=0), ["group_size = 0"]),
    "no block": ("fp8", lambda d: change(d, weight_block_size=None), ["one scale for a whole tensor"]),
    "a block of nothing": ("fp8", lambda d: change(d, weight_block_size=[0, 128]), ["weight_block_size = [0, 128]"]),
    "static": ("fp8", lambda d: change(d, activation_scheme="static"), ["'static'", "bfloat16"]),
    "e5m2": ("fp8", lambda d: change(d, fmt="e5m2"), ["'e5m2'"]),
    "compressed-tensors": ("fp8", lambda d: change(d, quant_method="compressed-tensors"),
                           ["llm-compressor", "AWQ (gemm)"]),
    "bitsandbytes": ("awq", lambda d: change(d, quant_method=None, load_in_4bit=True), ["'bitsandbytes'"]),
    "NVFP4": ("awq", lambda d: change(d, quant_method="modelopt"), ["NVFP4"]),
    "unheard of": ("awq", lambda d: change(d, quant_method="new"), ["'new' are not read: no reader"]),
    "no method": ("awq", lambda d: change(d, quant_method=None), ["has no quant_method"]),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_broken_or_unknown_is_named(written, tmp_path, fault):
    name, damage, expected = BROKEN[fault]
    directory = shutil.copytree(written("qwen2_5_vl", name)[0], tmp_path / "model")
    damage(directory)
    _, _, problems = make_plan(directory, 2, "float32")
    assert problems and all(any(words in p for p in problems) for words in expected), problems
    with pytest.raises(UserError, match=f"{directory}(: | cannot be used:)"):
        checked_plan(directory, 2, "float32")


def test_a_form_that_is_not_read_is_one_problem(written, tmp_path):
    directory = shutil.copytree(written("qwen2_vl", "awq")[0], tmp_path / "model")
    change(directory, quant_method="aqlm")
    assert len(make_plan(directory, 2, "float32")[2]) == 1


def test_a_bias_of_no_layer_must_be_zero(written, tmp_path):
    """Older writers of GPTQ give every layer a bias."""
    directory = shutil.copytree(written("qwen2_vl", "gptq4")[0], tmp_path / "model")
    resave(lambda t, m: t.update({f"{m}.bias": torch.zeros(224)}))(directory)
    plan, checkpoint = checked_plan(directory, 2, "float32")
    checkpoint.read(f"{DOWN}.weight", plan.slice(DOWN, "weight", 1))
    resave(lambda t, m: t.update({f"{m}.bias": torch.ones(224)}))(directory)
    plan, checkpoint = checked_plan(directory, 2, "float32")
    with pytest.raises(UserError, match=f"'{DOWN}.bias' is not zero"):
        checkpoint.read(f"{DOWN}.weight", plan.slice(DOWN, "weight", 1))


@pytest.mark.parametrize("index", [-1, 19, 2**31 - 1])
def test_a_group_that_is_not_there(written, tmp_path, index):
    directory = shutil.copytree(written("qwen2_vl", "gptq4")[0], tmp_path / "model")
    resave(lambda t, m: t[f"{m}.g_idx"].index_fill_(0, torch.tensor([3]), index))(directory)
    plan, checkpoint = checked_plan(directory, 1, "float32")
    with pytest.raises(UserError, match=rf"{DOWN}.weight': g_idx names groups"):
        checkpoint.read(f"{DOWN}.weight", plan.slice(DOWN, "weight", 0))


def test_groups_that_no_input_is_in(written, tmp_path):
    """All inputs of the first group: then that is what both decoders read, whole and cut."""
    directory = shutil.copytree(written("qwen2_vl", "gptq4")[0], tmp_path / "model")
    resave(lambda t, m: t[f"{m.replace('down', 'up')}.g_idx"].zero_())(directory)
    up = DOWN.replace("down", "up")
    for rank in range(3):
        plan, checkpoint = checked_plan(directory, 3, "float32")
        part, whole = plan.slice(up, "weight", rank), read_plain(checkpoint, f"{up}.weight")
        assert torch.equal(checkpoint.read(f"{up}.weight", part), cut(whole, part))
        assert torch.equal(checkpoint.read(f"{up}.weight", part.whole), whole)


@pytest.mark.parametrize("name", ["awq", "gptq4"])
def test_the_files_say_what_is_quantised(dense, tmp_path, name):
    """A head of 203 outputs, which fill no whole words; modules_to_not_convert says that it is dense."""
    directory = quantised(dense["qwen2_5_vl"], tmp_path / "model", KINDS[name], decoded=tmp_path / "meant",
                          which=("down_proj.weight", "lm_head.weight"))
    change(directory, modules_to_not_convert=["lm_head"])
    meant = load_file(tmp_path / "meant" / "model.safetensors")["lm_head.weight"]
    for rank in range(3):
        plan, checkpoint = checked_plan(directory, 3, "bfloat16")
        part = plan.slice("lm_head", "weight", rank)
        assert torch.equal(checkpoint.read("lm_head.weight", part), cut(meant, part))
    assert checkpoint.is_quantised(f"{DOWN}.weight") and not checkpoint.is_quantised(f"{Q}.weight")


def test_plans_are_those_of_the_dense_model(dense, written):
    """The same slices, sizes and bytes: what ranks hold is decoded."""
    plan, _ = checked_plan(dense["qwen2_vl"], 3, "bfloat16")
    coded, _ = checked_plan(written("qwen2_vl", "awq")[0], 3, "bfloat16")
    assert [coded.weight_bytes(r) for r in range(3)] == [plan.weight_bytes(r) for r in range(3)]
    assert coded.sizes_that_work() == plan.sizes_that_work()


def run_plan(directory: Path, *more: str) -> subprocess.CompletedProcess:
    """`plan`, in a process where importing torch is an error."""
    code = "import sys; sys.modules['torch'] = None; from adapter.commands.plan import start; start()"
    return subprocess.run([sys.executable, "-c", code, "--config", "configs/qwen2_vl_2b_tp2.yaml",
                           f"model.path={directory}", *more], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_plan_says_what_the_files_are_and_what_ranks_hold(written):
    done = run_plan(written("qwen2_5_vl", "awq")[0], "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["problems"] == [], done.stderr
    assert "quantised (AWQ, 4 bits, groups of 16)" in done.stderr and "hold the weights in bfloat16" in done.stderr


def test_a_form_that_is_not_read_is_exit_2(written, tmp_path):
    directory = shutil.copytree(written("qwen2_5_vl", "fp8")[0], tmp_path / "model")
    change(directory, quant_method="compressed-tensors")
    done = run_plan(directory)
    assert done.returncode == 2 and "llm-compressor" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_answers_of_other_codes_are_not_taken_over(written, tmp_path):
    """What a resumed job compares covers the codes and how they are to be read."""
    digests = [identity.checkpoint(written("qwen2_vl", "gptq4")[0])]
    for damage in (resave(lambda t, m: t[f"{m}.qzeros"].add_(1)), lambda d: change(d, checkpoint_format="gptq_v2")):
        directory = shutil.copytree(written("qwen2_vl", "gptq4")[0], tmp_path / f"model{len(digests)}")
        damage(directory)
        digests.append(identity.checkpoint(directory))
    assert len(set(digests)) == 3


@pytest.mark.parametrize(("name", "form", "refused"), [
    ("awq", "int4", True), ("gptq4", "int4", True), ("awq", "int8", False), ("gptq8", "int4", False),
    ("fp8", "int4", False), ("fp8", "int8", False)])
def test_four_bits_are_not_rounded_to_four_bits_again(written, name, form, refused):
    _, _, problems = make_plan(written("qwen2_5_vl", name)[0], 1, "bfloat16", form=form)
    assert bool(problems) == refused and all("weights.format=int8" in p for p in problems), problems


def test_forms_are_words_of_the_config():
    assert form_of({}) is None
    assert form_of({"quantization_config": KINDS["awq"].section}) == Awq(4, 16)
    assert str(form_of({"quantization_config": kind("fp8", 128).section})) == "FP8, blocks of 128 x 128"
