"""Adapters on both encoders over two ranks: the tokens of one process with the weights that PEFT merges, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import Shape, cases, make_checkpoint, newer_name
from launching import launch
from loras import linears, make_lora
from safetensors.torch import load_file
from worker import inputs_for, run

WORKER = Path(__file__).with_name("worker.py")
SHAPE = Shape(heads=6, kv_heads=2, layers=2, v_layers=2)
pytestmark = pytest.mark.ranks


def test_tokens_are_those_of_pefts_merge(tmp_path):
    import peft
    import transformers

    model, modules = make_checkpoint(tmp_path / "m", SHAPE), linears(SHAPE.tensors())
    text = {name: shape for name, shape in modules.items() if "visual" not in name}
    adapters = [make_lora(tmp_path / "text", text, rename=newer_name, lora_alpha=0.5, use_rslora=True),
                make_lora(tmp_path / "both", modules, r=3, rename=newer_name, lora_alpha=1, seed="b")]
    outcome = launch(2, WORKER, "--out", str(tmp_path), "--adapters", ",".join(map(str, adapters)), str(model))
    assert outcome.code == 0, outcome.err[-5000:]
    ours = load_file(tmp_path / "m.tp2.safetensors")
    theirs = transformers.Qwen2VLForConditionalGeneration.from_pretrained(model, torch_dtype=torch.float32).eval()
    with torch.inference_mode():
        plain = theirs(**inputs_for(cases()["image"], "cpu")).logits[0]
    for adapter in adapters:
        theirs = peft.PeftModel.from_pretrained(theirs, adapter).merge_and_unload()
    one = run(theirs.eval(), theirs.generate, SHAPE.vocab)
    for case in cases():
        assert float((ours[f"{case}.logits"] - one[f"{case}.logits"]).abs().max()) < 1e-4, case
    assert float((ours["image.logits"] - plain).abs().max()) > 1, "the adapters change what the model says"
    tokens = [f"{case}.tokens" for case in (*cases(), "beams", "positional")]
    assert [name for name in tokens if not torch.equal(ours[name], one[name])] == []
    assert ours["equal_on_ranks"].all()
