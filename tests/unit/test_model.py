"""What is put into a model: modules by published names, weights on their device, and what only a CPU gets."""

from __future__ import annotations

import math
import re
import weakref
from types import SimpleNamespace as Namespace

import deepspeed
import pytest
import torch
import transformers
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from adapter.health import self_test as self_test_module
from adapter.health.self_test import self_test, skeletons
from adapter.kernels import build, fused
from adapter.model import attention, inject
from adapter.model.attention import CpuAttention
from adapter.model.checks import check_prompt
from adapter.model.layers import VocabParallelEmbedding
from adapter.model.meta_init import build_on_meta
from adapter.model.published import PublishedModules
from adapter.parallel.group import Group
from adapter.planning.load import checked_plan
from adapter.requests import batching
from adapter.verify.precision import full_precision
from policies.errors import CheckFailed, UserError


class Gpu:
    """DeepSpeed's accelerator of a machine with a card, as far as it is asked here."""

    def device_name(self) -> str:
        return "cuda"


@pytest.fixture
def parts(tmp_path):
    """(model on meta, plan, checkpoint) of a small random model, tp 1."""
    directory = make_checkpoint(tmp_path / "m")
    plan, checkpoint = checked_plan(directory, 1, "float32")
    return build_on_meta(directory, plan.policy, torch.float32, "sdpa"), plan, checkpoint


@pytest.fixture
def on_a_card(monkeypatch):
    """This process as one of a machine with a card; nothing may be compiled or loaded."""
    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", Gpu)
    monkeypatch.setattr(build, "_build", lambda library: pytest.fail("the operators were compiled"))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("the operators were loaded"))
    build.unavailable.cache_clear()
    yield
    build.unavailable.cache_clear()


def test_modules_by_published_names_are_those_that_are_in_the_model_now(parts):
    model, plan, _ = parts
    modules = PublishedModules(model, plan.policy)
    assert plan.claims.keys() <= modules.keys() and len(modules) == len(list(model.modules()))
    new = nn.Identity()
    modules.replace("model.layers.1.mlp.down_proj", new)
    assert modules["model.layers.1.mlp"].down_proj is new is modules["model.layers.1.mlp.down_proj"]
    old = weakref.ref(new)
    del new
    modules.replace("model.layers.1.mlp.down_proj", nn.Identity())
    assert old() is None, "a replaced module is freed"


def test_no_operator_is_compiled_on_a_machine_with_cards(on_a_card):
    assert "cuda" in build.unavailable()
    assert "cuda" in fused.unavailable("cuda") and fused.operators(False) is fused.TorchOps


def test_slices_of_columns_are_read_without_the_operators(parts, on_a_card):
    _, plan, checkpoint = parts
    name = "model.layers.0.self_attn.o_proj"
    part = checked_plan(checkpoint.directory, 2, "float32")[0].slice(name, "weight", 1)
    whole = checkpoint.read(f"{name}.weight", plan.slice(name, "weight", 0))
    (a, b), = part.ranges
    assert part.dim == 1 and torch.equal(checkpoint.read(f"{name}.weight", part), whole[:, a:b])


def test_a_model_for_a_card_keeps_its_classes_and_its_weights_never_gather_on_the_host(parts, monkeypatch):
    """`meta` stands for the card: what goes there leaves the host. At each read, all tensors read before are gone."""
    model, plan, checkpoint = parts
    before = {name: type(module) for name, module in model.named_modules()}
    read = list[weakref.ref]()

    def source(name, part):
        assert not [r for r in read if r() is not None], f"still on the host when {name} is read"
        tensor = checkpoint.read(name, part)
        read.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(inject, "_check_whole", lambda *_: None)  # it refuses meta
    inject.inject(model, plan, Group(0, 1), source, torch.float32, "meta")
    assert len(read) == len(list(plan.parameters()))
    assert not [m for m in model.modules() if isinstance(m, fused.Tabled | fused.Patches)]
    names = PublishedModules(model, plan.policy).names
    kept = [n for published, n in names.items() if published not in plan.claims and n in before]
    assert all(type(model.get_submodule(n)) is before[n] for n in kept)
    assert model.config.get_text_config()._attn_implementation == "sdpa" == model.config._attn_implementation


def test_the_cpu_attention_takes_the_place_of_the_vision_encoders(parts, monkeypatch):
    model, plan, _ = parts
    if not hasattr(transformers, "AttentionInterface"):
        pytest.skip("this release attends by classes of its own")
    monkeypatch.setattr(CpuAttention, "_register", lambda self: True)
    modules = PublishedModules(model, plan.policy)
    before = {name: type(module) for name, module in modules.items()}
    CpuAttention(modules, plan).apply()
    swapped = [name for name, module in modules.items() if type(module) is not before[name]]
    assert swapped == [f"visual.blocks.{i}.attn" for i in range(2)]
    assert isinstance(modules[swapped[0]], attention._Rotating)
    assert modules["visual.blocks.0.attn"].config._attn_implementation == attention.IMPLEMENTATION
    assert modules[swapped[0]].__class__.__name__ == before[swapped[0]].__name__


def precision() -> list:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return [matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_tf32, cudnn.allow_tf32]


def test_reduced_precision_is_off_within_and_as_before_after():
    """torch's own default allows it, which no bound of verify accounts for."""
    before = precision()
    assert any(before), "torch's default"
    with full_precision():
        assert precision() == [False] * 4
    assert precision() == before
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert precision() == before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9 has the older names only")
def test_settings_by_the_newer_names_are_kept_too():
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with full_precision():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


@pytest.fixture
def shard(tmp_path):
    """Make (model, plan, skeletons) of a small random checkpoint in a dtype, loaded for tp 1."""
    def make(dtype: str, name: str = "", factor: float = 1.0):
        directory = make_checkpoint(tmp_path / "s", files=1)
        if name:
            tensors = load_file(directory / "model.safetensors")
            save_file(tensors | {name: tensors[name] * factor}, directory / "model.safetensors")
        plan, checkpoint = checked_plan(directory, 1, dtype)
        model = build_on_meta(directory, plan.policy, getattr(torch, dtype), "sdpa")
        whole = skeletons(model, plan)
        inject.inject(model, plan, Group(0, 1), checkpoint.read, getattr(torch, dtype))
        return model.eval(), plan, whole

    return make


@pytest.mark.parametrize(("dtype", "name", "factor"), [
    ("float16", "model.layers.1.mlp.down_proj.weight", 1e30), ("bfloat16", "visual.blocks.1.norm1.bias", math.nan)])
def test_weights_that_are_not_finite_are_refused_before_anything_is_served(shard, dtype, name, factor):
    """A layer that the self-test does not run: its first layers only would pass."""
    with pytest.raises(CheckFailed, match=f"not finite.*{re.escape(name)}, torch.{dtype}.*bfloat16.*damaged"):
        self_test(*shard(dtype, name, factor)[:2], Group(0, 1), {})


def test_an_output_that_is_not_finite_is_refused(shard):
    """Two sides that are both infinite are alike, which is no answer."""
    model, plan, whole = shard("float16", "model.layers.0.mlp.down_proj.weight", 6e4)
    with pytest.raises(CheckFailed, match=r"not finite.*output of model.layers.0.mlp, torch.float16"):
        self_test(model, plan, Group(0, 1), whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_sound_model_passes_in_full_precision_and_gets_its_settings_back(shard, dtype, monkeypatch):
    before, seen, run = precision(), [], self_test_module._run
    monkeypatch.setattr(self_test_module, "_run", lambda *args: [seen.append(precision()), run(*args)])
    model, plan, whole = shard(dtype)
    self_test(model, plan, Group(0, 1), whole)
    assert seen == [[False] * 4] * 2 and precision() == before


class Ranks:
    """A group of two ranks of which this is rank 0, the other has `theirs`."""

    size = 2

    def __init__(self, theirs: list[int]) -> None:
        self.theirs = theirs

    def all_gather_last(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
        return torch.cat([x, torch.tensor(self.theirs)])


@pytest.mark.parametrize(("mine", "theirs", "words"), [
    ([[3, 203]], [0, 1], "token id 203 in the prompt of rank 0.* 0 to 202"),
    ([[3, 4]], [-7, 1], "token id -7 in the prompt of rank 1.* 0 to 202"),
])
def test_an_id_out_of_the_vocabulary_is_refused_on_every_rank(mine, theirs, words):
    with pytest.raises(UserError, match=words):
        check_prompt(torch.tensor(mine), 203, Ranks(theirs))
    check_prompt(torch.tensor([[0, 202]]), 203, Ranks([0, 202]))
    check_prompt(torch.zeros(1, 0, dtype=torch.int64), 203, Ranks([0, 0]))


def test_an_id_out_of_the_vocabulary_is_refused_by_a_forward():
    embedding = VocabParallelEmbedding(torch.ones(4, 2), (0, 4), 4, Group(0, 1))
    for ids in ([[4]], [[0, -1]]):
        with pytest.raises(IndexError, match=f"token id {ids[0][-1]}: .* 0 to 3"):
            embedding(torch.tensor(ids))
    assert embedding(torch.tensor([[0, 3]])).shape == (1, 2, 2)


def test_the_memory_of_each_card_is_among_the_facts_of_its_rank(monkeypatch):
    class Card(Gpu):
        def max_memory_allocated(self) -> int:
            return 12345

    facts = Namespace(load_report=Namespace(weight_bytes=1, bytes_read=2, seconds=3.0),
                      mpu=Namespace(replicas=Group(0, 1), tp=Group(0, 1), world=Group(0, 1)),
                      plan=Namespace(heads={"text": [Namespace(q=(0, 1), kv=(0, 1))], "vision": [Namespace(q=(0, 1))]}))
    assert "device_peak_bytes" not in batching.rank_facts(facts)[0]
    monkeypatch.setattr(batching, "get_accelerator", Card, raising=False)
    assert batching.rank_facts(facts)[0]["device_peak_bytes"] == 12345
