"""What somebody puts into a text decoder is honoured: hooks, forwards and modules of theirs send an answer to
Transformers' own loop, with a reason in the log. This process becomes a rank."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from checkpoints import cases, make_checkpoint
from decoding import SHAPE, TWELVE, lean, loop_of

import adapter
from adapter.config.load import from_dict
from adapter.generation.decoder import Decoder, check_total
from adapter.generation.loop import DecodeLoop
from adapter.kernels import fused

pytestmark = lean


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("changes") / "m", SHAPE)


@pytest.fixture(scope="module")
def engine(directory):
    config = {"model": {"path": str(directory), "dtype": "float32"},
              "tensor_parallel": {"tp_size": 1, "self_test": False}}
    return adapter.init_inference(from_dict(config, directory))


@pytest.fixture(autouse=True)
def nothing_was_reported_yet(engine):
    """A reason is a warning once for an engine."""
    inspect.unwrap(engine.module.generate).reported.clear()


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """A number for each step of our loop."""
    seen: list[int] = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, ids, cache: (seen.append(len(ids)), step(self, ids, cache))[1])
    return seen


def by_transformers(engine, monkeypatch):
    """The tokens of Transformers' own loop on the same engine."""
    with monkeypatch.context() as patch:
        patch.setattr(DecodeLoop, "why_not", lambda *_: "asked for")
        return engine.generate(**cases()["batch"], **TWELVE)


def doubled(module, args, output):
    return 2 * output


class Steered(torch.nn.Module):
    """A wrapper around a linear layer, as LoRA by hand or activation steering puts there."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


PLACES = ["model.language_model.layers.1.mlp", "model.language_model.layers.0.self_attn.q_proj",
          "model.language_model.layers.1.mlp.act_fn", "model.language_model.layers.0.input_layernorm",
          "model.language_model.norm", "model.language_model.embed_tokens", "lm_head", "model.language_model", "model"]


@pytest.mark.parametrize("place", PLACES)
def test_a_hook_is_called_at_every_token(engine, steps, caplog, place):
    seen: list[int] = []
    hook = engine.module.get_submodule(place).register_forward_hook(lambda *_: seen.append(1))
    with caplog.at_level(logging.WARNING, "adapter"):
        engine.generate(**cases()["batch"], **TWELVE)
    assert len(seen) == 12 and not steps and f"a hook on {place}" in caplog.text
    hook.remove()
    engine.generate(**cases()["batch"], **TWELVE)
    assert len(seen) == 12 and len(steps) == 11, "once it is gone, all is as before"


@pytest.mark.parametrize("place", PLACES[:2])
def test_a_hook_that_changes_something_does(engine, monkeypatch, place):
    before = engine.generate(**cases()["batch"], **TWELVE)
    hook = engine.module.get_submodule(place).register_forward_hook(doubled)
    ours, theirs = engine.generate(**cases()["batch"], **TWELVE), by_transformers(engine, monkeypatch)
    hook.remove()
    assert torch.equal(ours, theirs) and not torch.equal(ours, before)
    assert torch.equal(engine.generate(**cases()["batch"], **TWELVE), before)


def test_a_module_wrapped_after_the_first_answer_is_used(engine, monkeypatch, caplog):
    before = engine.generate(**cases()["batch"], **TWELVE)
    mlp = engine.module.model.language_model.layers[1].mlp
    mlp.down_proj = Steered(mlp.down_proj)
    with caplog.at_level(logging.WARNING, "adapter"):
        ours = engine.generate(**cases()["batch"], **TWELVE)
    assert torch.equal(ours, by_transformers(engine, monkeypatch)) and not torch.equal(ours, before)
    assert "layers.1.mlp.down_proj is a Steered, was a RowParallelLinear" in caplog.text
    mlp.down_proj = mlp.down_proj.inner
    assert torch.equal(engine.generate(**cases()["batch"], **TWELVE), before)


def test_a_module_of_the_same_kind_put_in_anothers_place_is_used(engine, steps, monkeypatch):
    """Our loop takes the modules as they are at each call."""
    before = engine.generate(**cases()["batch"], **TWELVE)
    first, second = engine.module.model.language_model.layers
    first.mlp, second.mlp = second.mlp, first.mlp
    ours, theirs = engine.generate(**cases()["batch"], **TWELVE), by_transformers(engine, monkeypatch)
    first.mlp, second.mlp = second.mlp, first.mlp
    assert len(steps) == 22 and not torch.equal(ours, before) and torch.equal(ours, theirs)


@pytest.mark.parametrize("place, kind, name, new, words", [
    ("model.language_model.layers.0", "__dict__", "forward", lambda x, **_: x, "has a forward of its own"),
    ("", "__dict__", "prepare_inputs_for_generation", lambda ids, **more: {"input_ids": ids},
     "has a prepare_inputs_for_generation of its own"),
    ("model.language_model.layers.0", "_modules", "lora", torch.nn.Linear(2, 2), "a new module"),
], ids=["forward", "inputs", "module"])
def test_other_changes_are_seen(engine, monkeypatch, place, kind, name, new, words):
    monkeypatch.setitem(getattr(engine.module.get_submodule(place), kind), name, new)
    assert words in inspect.unwrap(engine.module.generate).why_not((), {**cases()["text"], **TWELVE})


def test_a_class_whose_forward_was_replaced_is_seen(engine, steps, monkeypatch):
    norm = type(engine.module.model.language_model.norm)
    monkeypatch.setattr(norm, "forward", lambda self, x: x)
    engine.generate(**cases()["text"], **TWELVE)
    assert not steps


def test_a_hook_on_every_module_is_seen(engine, steps):
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    engine.generate(**cases()["text"], **TWELVE)
    hook.remove()
    assert not steps


def test_hooks_that_transformers_leaves_cost_nothing(engine, steps):
    """It keeps them in the layers after a call that asked for attentions; they do nothing in a call that does not."""
    asked = {"output_attentions": True, "return_dict_in_generate": True}
    engine.generate(**cases()["text"], **TWELVE, **asked)
    assert not steps
    engine.generate(**cases()["text"], **TWELVE)
    assert len(steps) == 11


@pytest.mark.parametrize("place, name", [
    ("model.language_model.layers.1.self_attn", "q_norm"), ("model.language_model.layers.1", "adapter"),
    ("model.language_model", "embed_norm"), ("model", "projector")])
def test_a_module_that_the_page_does_not_name_is_refused(engine, monkeypatch, place, name):
    """A family may have a norm of queries; the loop must not leave it out."""
    monkeypatch.setitem(engine.module.get_submodule(place)._modules, name, torch.nn.LayerNorm(8))
    with pytest.raises(LookupError, match=rf"{name} \(LayerNorm\) is not among the modules"):
        check_total(engine.module, engine.plan)


def test_a_parameter_between_the_modules_is_refused(engine, monkeypatch):
    attention = engine.module.model.language_model.layers[1].self_attn
    monkeypatch.setitem(attention._parameters, "sinks", torch.nn.Parameter(torch.zeros(6)))
    with pytest.raises(LookupError, match=r"self_attn has parameters of its own \(sinks\)"):
        check_total(engine.module, engine.plan)


def test_a_family_with_norms_of_queries_is_decoded_by_transformers(engine, monkeypatch, caplog):
    """From the start, so that no module is new: the reason is in the log."""
    for layer in engine.module.model.language_model.layers:
        monkeypatch.setitem(layer.self_attn._modules, "q_norm", torch.nn.Identity())
    loop = loop_of(engine, monkeypatch)
    with caplog.at_level(logging.WARNING, "adapter"):
        assert "q_norm" in loop.why_not((), {**cases()["text"], **TWELVE})
    assert "q_norm (Identity) is not among the modules that the family's page names" in caplog.text


def test_another_activation_is_seen(engine, monkeypatch):
    monkeypatch.setitem(engine.module.model.language_model.layers[1].mlp._modules, "act_fn", torch.nn.GELU())
    with pytest.raises(LookupError, match="SiLU"):
        Decoder(engine.module, engine.plan, fused.operators(False))


def test_another_scale_of_attention_is_seen(engine, monkeypatch):
    monkeypatch.setattr(engine.module.model.language_model.layers[1].self_attn, "scaling", 1.0)
    with pytest.raises(LookupError, match="scale"):
        Decoder(engine.module, engine.plan, fused.operators(False))


@pytest.mark.parametrize("change", [lambda norm: setattr(norm, "variance_epsilon", 1e-3),
                                    lambda norm: vars(norm).pop("variance_epsilon")])
def test_a_norm_of_another_epsilon_is_seen(engine, monkeypatch, change):
    """A step takes one epsilon for all norms."""
    norm = engine.module.model.language_model.layers[1].post_attention_layernorm
    monkeypatch.setitem(vars(norm), "variance_epsilon", norm.variance_epsilon)  # put back in any case
    change(norm)
    with pytest.raises(LookupError, match="unlike epsilons"):
        Decoder(engine.module, engine.plan, fused.operators(False))
