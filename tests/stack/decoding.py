"""What the tests of the decode loop have in common: a small model, and a decoder after its prompt."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from checkpoints import Shape, cases

from adapter.generation.decoder import Decoder
from adapter.generation.kv_cache import Buffers, Room
from adapter.generation.loop import DecodeLoop
from adapter.generation.prefill import prefill
from adapter.kernels import fused

SHAPE = Shape(heads=6, kv_heads=2, head_dim=8, layers=2, mlp=96, vocab=203, v_heads=4, v_head_dim=8, v_layers=1)
TWELVE = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
TAKES_A_LOOP = "custom_generate" in inspect.signature(transformers.GenerationMixin.generate).parameters
lean = pytest.mark.skipif(not TAKES_A_LOOP, reason="this release takes no loop of a caller's")


def started(engine, compiled=None, rows=None):
    """A decoder after the prompt of a padded batch, with room for 8 tokens. compiled: the step's operators are those in
    C++, by default where there are any. rows: of the cache, more than the batch for a graph."""
    compiled = fused.unavailable("cpu") is None if compiled is None else compiled
    decoder, inputs = Decoder(engine.module, engine.plan, fused.operators(compiled)), cases()["batch"]
    batch, prompt = inputs["input_ids"].shape
    room = Room(rows or batch, prompt + 8, prompt + 8, True)
    with torch.no_grad():
        logits, cache = prefill(
            decoder, lambda cache: engine.module(**inputs, use_cache=True, past_key_values=cache),
            inputs["attention_mask"], room, Buffers())
    return decoder, logits.argmax(-1), cache


def loop_of(engine, monkeypatch, **options):
    """A loop of its own for a model that has one already, around Transformers' `generate`."""
    with monkeypatch.context() as patch:
        patch.delattr(engine.module, "generate")
        return DecodeLoop(engine.module, engine.plan, engine.mpu.tp, **options)
