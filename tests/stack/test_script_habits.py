"""What scripts do with the model and the call before the three lines: it works as before, or a message says what to do.

One process, one rank: everything here is decided before ranks join.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import transformers
from checkpoints import Shape, cases, make_checkpoint
from deepspeed.accelerator import get_accelerator
from torch import nn

import adapter
from adapter.model.inject import inject, model_source
from adapter.parallel import parallel_state
from adapter.parallel.group import Group
from adapter.planning.plan import Plan
from policies.errors import UserError
from policies.families.qwen2_vl import POLICY

SMALL = Shape(heads=6, kv_heads=2, head_dim=8, layers=1, mlp=96, vocab=203, v_heads=4, v_head_dim=8, v_layers=1)
ROUNDING = 0.03  # of the largest logit: bfloat16 in another order of sums
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
Model = transformers.Qwen2VLForConditionalGeneration
CALLS: dict[str, Callable[..., Any]] = {
    "kept": lambda model, **more: deepspeed.init_inference(model, **adapter.deepspeed_kwargs(model, 1, **more)),
    "adapters": lambda model, **more: adapter.init_inference(model=model, tensor_parallel={"tp_size": 1}, **more),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[bool, Path]:
    """Untied and tied."""
    home = tmp_path_factory.mktemp("habits")
    return {tied: make_checkpoint(home / str(tied), replace(SMALL, tied=tied)) for tied in (False, True)}


@pytest.fixture
def load(directories) -> Callable[..., nn.Module]:
    return lambda tied=False, **more: Model.from_pretrained(directories[tied], **{"torch_dtype": torch.float32, **more})


def tokens(model: Any) -> torch.Tensor:
    return model.generate(**cases()["batch"], **GREEDY)


def logits(model: Any) -> torch.Tensor:
    """Of the tokens that are no padding."""
    inputs = cases()["batch"]
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()].float()


# -- it works as before

def training(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable()
    return model.train()


def tied_by_hand(model: nn.Module) -> nn.Module:
    model.lm_head.weight = model.get_input_embeddings().weight
    return model


def resized(model: nn.Module) -> nn.Module:
    model.resize_token_embeddings(300)
    return model


def own_generation_config(model: nn.Module) -> nn.Module:
    model.generation_config = transformers.GenerationConfig(repetition_penalty=1.7, pad_token_id=0)
    return model


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("habit", [training, tied_by_hand, resized, own_generation_config],
                         ids=lambda habit: habit.__name__)
def test_the_engine_is_the_model_it_was_given(load, call, habit):
    """Not in training, whatever it was before: an engine answers."""
    model = habit(load())
    expected = tokens(model.eval())
    model = model.train(habit is training)
    engine = CALLS[call](model)
    assert torch.equal(tokens(engine), expected)
    assert not any(module.training for module in engine.module.modules())
    assert engine.module.plan.tp_size == 1 and engine.module.load_report.weight_bytes > 0


@pytest.mark.skipif(transformers.__version__ < "5", reason="before Transformers 5 num_beams is 1, not None")
def test_deepspeeds_generate_wants_num_beams_beside_a_generation_config(load):
    """docs/python.md and troubleshooting.md say so. Where this fails, DeepSpeed has learnt it."""
    engine = CALLS["kept"](load())
    config = {"generation_config": engine.module.generation_config}
    with pytest.raises(TypeError, match="'>' not supported between instances of 'NoneType' and 'int'"):
        engine.generate(**cases()["batch"], **GREEDY, **config)
    assert torch.equal(engine.generate(**cases()["batch"], **GREEDY, **config, num_beams=1), tokens(engine))


@pytest.mark.parametrize("call", CALLS)
def test_a_model_made_bfloat16_after_loading(load, call):
    """As DeepSpeedExamples do it with .half(). It rounds the rotary frequencies; the engine computes with those."""
    model = load().bfloat16()
    expected = logits(model)
    engine = CALLS[call](model)
    assert engine.module.dtype == torch.bfloat16
    assert (logits(engine) - expected).abs().max() <= ROUNDING * expected.abs().max()


@pytest.mark.parametrize("more", [
    {"torch_dtype": "auto"}, {"low_cpu_mem_usage": True}, {"attn_implementation": "eager"},
    {"attn_implementation": "sdpa"},
], ids=lambda more: next(iter(more)))
def test_ways_to_load(load, more):
    expected = tokens(load(**more).eval())
    assert torch.equal(tokens(CALLS["kept"](load(**more))), expected)


@pytest.mark.parametrize("more", [
    {"replace_with_kernel_inject": False}, {"replace_method": "auto"}, {"max_tokens": 77},
    {"save_mp_checkpoint_path": None},
], ids=lambda more: next(iter(more)))
def test_arguments_of_a_stock_call_that_may_stay(load, more):
    for call in CALLS.values():
        assert call(load(), **more)._config.max_out_tokens == more.get("max_tokens", 4096)


def test_forward_alone_and_under_deepspeeds_own_names(load):
    expected = logits(load().eval())
    engine = CALLS["kept"](load()).to("cpu")
    assert torch.equal(logits(engine), expected)
    assert engine.config.model_type == "qwen2_vl"


# -- a message says what to do

def on_meta(model: nn.Module) -> nn.Module:
    return model.to("meta")


def spread(model: nn.Module) -> nn.Module:
    """As accelerate leaves a model that device_map put on several devices."""
    model.model.visual._hf_hook = object()
    return model


def quantised(model: nn.Module) -> nn.Module:
    projection = model.lm_head
    projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    return model


def quantised_by_transformers(model: nn.Module) -> nn.Module:
    model.is_quantized = True
    return model


def with_lora(model: nn.Module) -> nn.Module:
    """As PEFT leaves a linear: in a module of its own, with the low-rank pair beside it."""
    for layer in model.model.language_model.layers:
        inner = layer.self_attn.q_proj
        layer.self_attn.q_proj = nn.ModuleDict({"base_layer": inner, "lora_A": nn.Linear(48, 2, bias=False)})
    return model


def peft_model(model: nn.Module) -> nn.Module:
    wrapper = nn.Module()
    wrapper.base, wrapper.config, wrapper.merge_and_unload = model, model.config, lambda: model
    return wrapper


def wrapped(model: nn.Module) -> nn.Module:
    wrapper = nn.Module()
    wrapper.inner, wrapper.config = model, model.config
    return wrapper


def new_head(model: nn.Module) -> nn.Module:
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def edited_config(model: nn.Module) -> nn.Module:
    model.config.text_config.intermediate_size = 64
    return model


def flash_in_float32(model: nn.Module) -> nn.Module:
    model.config._attn_implementation = "flash_attention_2"
    return model


def family(model: nn.Module) -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=10))


class Joined(BaseException):
    """Where the ranks would have joined."""


def joined(*_: Any, **__: Any) -> None:
    raise Joined


def without_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without AVX512-FP16: on one that has it, DeepSpeed computes in float16."""
    monkeypatch.setattr(get_accelerator(), "supported_dtypes", lambda: [torch.float, torch.bfloat16])


@pytest.mark.parametrize(("habit", "words"), [
    (on_meta, "from_pretrained.*init_inference"), (spread, "without device_map"),
    (quantised, "without quantization_config"), (quantised_by_transformers, "without quantization_config"),
    (with_lora, "merge_and_unload"), (peft_model, "merge_and_unload"), (wrapped, "Module is not a Qwen2VLFor"),
    (torch.compile, "before anything wraps it"), (torch.nn.DataParallel, "a Transformers model is needed"),
    (lambda model: model.model, "Qwen2VLModel is not a Qwen2VLForConditionalGeneration"),
    (lambda model: model.model.language_model, "no policy for model_type 'qwen2_vl_text'"),
    (edited_config, r"gate_proj.weight has \[96, 48\], its config says \[64, 48\]"),
    (flash_in_float32, "flash_attention_2 computes in bfloat16"), (family, "bert.*known: qwen2_5_vl, qwen2_vl"),
    (lambda model: model.half(), "torch.float16: DeepSpeed on cpu"),
    (lambda model: model.double(), "torch.float64: DeepSpeed on cpu"),
], ids=lambda value: getattr(value, "__name__", "").strip("<>") or None)
def test_models_that_cannot_be_shards(load, habit, words, monkeypatch):
    without_float16(monkeypatch)
    monkeypatch.setattr(parallel_state, "start", joined)
    for call in CALLS.values():
        with pytest.raises(UserError, match=f"(?s){words}"):
            call(habit(load()))


@pytest.mark.parametrize("call", CALLS)
def test_float16_is_taken_where_deepspeed_computes_in_it(load, monkeypatch, call):
    monkeypatch.setattr(get_accelerator(), "supported_dtypes", lambda: [torch.float, torch.bfloat16, torch.float16])
    monkeypatch.setattr(parallel_state, "start", joined)
    with pytest.raises(Joined):
        CALLS[call](load().half())


def test_a_head_of_its_own_where_the_config_ties_it(load):
    """The policy follows the config, and would give the shards the embedding for a head."""
    with pytest.raises(UserError, match="tie_word_embeddings = False"):
        CALLS["kept"](new_head(load(tied=True)))
    model = new_head(load(tied=True)).eval()
    model.config.tie_word_embeddings = False
    expected = tokens(model)
    assert torch.equal(tokens(CALLS["kept"](model)), expected)
    assert not torch.equal(tokens(load(tied=True)), expected)


@pytest.mark.parametrize("first", CALLS)
@pytest.mark.parametrize("second", CALLS)
def test_a_second_call_says_that_there_was_a_first(load, first, second):
    model = load()
    engine = CALLS[first](model)
    with pytest.raises(UserError, match="a rank's shard already"):
        CALLS[second](model)
    with pytest.raises(UserError, match="an engine already"):
        CALLS[second](engine)


@pytest.mark.parametrize(("argument", "value", "words"), [
    ("dtype", torch.bfloat16, "the dtype the model was loaded in"), ("mp_size", 4, "tp_size=N"),
    ("tp", {"tp_size": 4}, "tp_size=N"), ("replace_with_kernel_inject", True, "leave it out"),
    ("kernel_inject", True, "leave it out"), ("checkpoint", "shards.json", "the model's own"),
    ("config", {"max_out_tokens": 7}, "its keys as arguments"),
    ("max_new_token", 3, "Extra inputs"),
])
def test_arguments_of_a_stock_call_that_must_go(load, argument, value, words):
    """With a loaded model: `model.dtype` and other keys of a YAML file would be no help."""
    for call in CALLS.values():
        if (argument, call) != ("config", CALLS["adapters"]):
            with pytest.raises(UserError, match=f"{argument}.*{words}"):
                call(load(), **{argument: value})


def test_tp_size_where_the_other_call_has_it(load):
    with pytest.raises(UserError, match=r"tensor_parallel=\{'tp_size': N\}"):
        adapter.init_inference(model=load(), tp_size=1)
    with pytest.raises(UserError, match="tp_size=N"):
        adapter.deepspeed_kwargs(load(), tensor_parallel={"tp_size": 1})


def test_the_default_tp_size_in_a_job_of_another_size(load):
    for call in (adapter.deepspeed_kwargs, lambda model: adapter.init_inference(model=model)):
        with pytest.raises(UserError, match=r"1 rank .*without a launcher.*is 4.*--num_accelerators 4.*tp_size to 1$"):
            call(load())


def test_a_model_without_its_name(load):
    for more in ({}, {"tensor_parallel": {"tp_size": 1}}):
        with pytest.raises(UserError, match=r"by name: init_inference\(model=\.\.\.\)"):
            adapter.init_inference(load(), **more)


@pytest.mark.parametrize(("left", "words"), [
    ({"dtype": torch.float32}, "'dtype'"), ({"tensor_parallel": {"tp_size": 1}}, "'tensor_parallel'"),
    ({"mp_size": 1}, "'mp_size'"), ({"replace_with_kernel_inject": True}, "kernel injection"),
    ({"max_out_tokens": 1024}, "max_out_tokens"), ({"max_tokens": 1024}, "max_out_tokens"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else None)
def test_what_is_left_beside_deepspeed_kwargs_is_named_by_python_or_deepspeed(load, left, words):
    """The adapter cannot see it; what is raised names the argument. README: such arguments go into deepspeed_kwargs."""
    model = load()
    with pytest.raises((TypeError, ValueError, AssertionError), match=words):
        deepspeed.init_inference(model, **left, **adapter.deepspeed_kwargs(model, 1))


# -- flash attention, which cannot run here

def attend(q, k, v, softmax_scale=None, causal=False):
    """[batch, tokens, heads, head_dim], as flash-attn has it; the last query sees every key."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1]) if causal else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=True) \
        .transpose(1, 2)


@pytest.fixture
def flash_attention(monkeypatch) -> set[str]:
    """Transformers' flash_attention_2 path with sdpa where flash-attn's two functions would be called. -> who was."""
    called = set()

    def dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        called.add("dense")
        return attend(q, k, v, softmax_scale, causal)

    def ragged(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
               causal=False):
        called.add("ragged")
        spans = zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True)
        return torch.cat([attend(q[None, a:b], k[None, c:d], v[None, c:d], softmax_scale, causal)[0]
                          for (a, b), (c, d) in spans])

    home = transformers.modeling_flash_attention_utils
    monkeypatch.setattr(home, "_loaded_implementation", None)
    monkeypatch.setattr(home, "_lazy_imports",
                        lambda *_, **__: (dense, ragged, None, home._pad_input, home._unpad_input))
    return called


@pytest.mark.parametrize("call", CALLS)
def test_flash_attention_2_is_left_alone(load, flash_attention, call):
    """The shard keeps the choice, and Transformers' own flash path runs on its layers and head numbers. The kernels
    themselves need a GPU; what they compute is not tested."""
    model = load(torch_dtype=torch.bfloat16)
    model.config._attn_implementation = "flash_attention_2"
    expected = logits(model.eval())
    flash_attention.clear()
    engine = CALLS[call](model)
    configs = {module.config._attn_implementation for module in engine.module.modules() if hasattr(module, "config")}
    assert configs == {"flash_attention_2"}
    assert (logits(engine) - expected).abs().max() <= ROUNDING * expected.abs().max()
    assert flash_attention == {"dense", "ragged"}
    assert tokens(engine).shape[0] == len(cases()["batch"]["input_ids"])


# -- memory: what gives the full weights back, in one process

def test_weights_are_freed_module_by_module(load):
    """No reader of a loaded model keeps its modules: the next one is read when the last one's weights are gone."""
    model = load()
    plan = Plan(POLICY, POLICY.geometry(model.config.to_dict()), 3, "float32")
    read = model_source(model, POLICY)
    watched = {name: weakref.ref(p) for name, p in model.named_parameters()}
    alive: list[int] = []

    def counting(name, part):
        alive.append(sum(ref() is not None for ref in watched.values()))
        return read(name, part)

    inject(model, plan, Group(1, 3), counting, torch.float32)
    assert alive[0] == len(watched)
    assert all(later <= earlier for earlier, later in pairwise(alive)) and alive[-1] <= 2, alive


def test_no_shard_is_a_view_of_what_was_loaded(load):
    """Transformers maps files: one view of a mapped one, a norm's weight say, keeps all of its pages."""
    model = load()
    plan = Plan(POLICY, POLICY.geometry(model.config.to_dict()), 1, "float32")
    whole = [p.detach() for p in model.parameters()]
    inject(model, plan, Group(0, 1), model_source(model, POLICY), torch.float32)
    shards = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(shards) == len(whole) and not shards & {p.untyped_storage().data_ptr() for p in whole}
