"""What the tests of the decode loop have in common: a small model, and a decoder after its prompt."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from checkpoints import Shape, cases

from adapter.generation.decoder import Decoder

SHAPE = Shape(heads=6, kv_heads=2, head_dim=8, layers=2, mlp=96, vocab=203, v_heads=4, v_head_dim=8, v_layers=1)
TWELVE = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
TAKES_A_LOOP = "custom_generate" in inspect.signature(transformers.GenerationMixin.generate).parameters
lean = pytest.mark.skipif(not TAKES_A_LOOP, reason="this release takes no loop of a caller's")


def started(engine, ops=None):
    """A decoder after the prompt of a padded batch, with room for 8 tokens."""
    decoder, inputs = Decoder(engine.module, engine.plan), cases()["batch"]
    decoder.ops = ops or decoder.ops
    prompt = inputs["input_ids"].shape[1]
    with torch.no_grad():
        logits, state = decoder.prefill(lambda: engine.module(**inputs, use_cache=True), inputs["attention_mask"],
                                        prompt + 8)
    return decoder, logits.argmax(-1), state
