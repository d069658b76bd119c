"""The one-process side of verify: bit for bit plain Transformers, while it holds one module's weights at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import Shape, cases, make_checkpoint

from adapter.parallel.group import Group
from adapter.planning.load import checked_plan
from adapter.verify.comparison import furthest
from adapter.verify.reference import Reference

BIG = Shape(heads=12, kv_heads=2, head_dim=64, layers=8, mlp=6144, vocab=4000, v_layers=2, v_head_dim=40)
MEMORY = """
import json, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import torch
from adapter.planning.load import checked_plan
from adapter.verify.reference import Reference
plan, checkpoint = checked_plan(Path({directory!r}), 1, "float32")
reference = Reference(Path({directory!r}), plan, checkpoint, torch.float32, "sdpa", "cpu")
peak = lambda: 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
before = peak()
with reference.streaming(lambda: None) as model, torch.inference_mode():
    model(input_ids=torch.arange(8)[None], use_cache=False)
print(json.dumps(peak() - before))
"""


@pytest.mark.parametrize("shape, dtype", [
    (Shape(), torch.float32), (Shape(heads=12, kv_heads=2, tied=True), torch.bfloat16)])
def test_streaming_is_plain_transformers_bit_for_bit(tmp_path, shape, dtype):
    directory = make_checkpoint(tmp_path / "m", shape, dtype=dtype)
    plain = transformers.Qwen2VLForConditionalGeneration.from_pretrained(directory, torch_dtype=torch.float32).eval()
    plan, checkpoint = checked_plan(directory, 2, "float32")
    reference, ticks = Reference(directory, plan, checkpoint, torch.float32, "sdpa", "cpu"), []
    inputs = cases(shape.vocab)["batch"]
    with torch.inference_mode(), reference.streaming(lambda: ticks.append(1)) as model:
        ours = model(**inputs, use_cache=False).logits
    with torch.inference_mode():
        assert torch.equal(ours, plain(**inputs, use_cache=False).logits)
    assert len(ticks) >= len(plan.claims)
    assert all(p.untyped_storage().nbytes() <= 4 for p in reference.exact.parameters()), "nothing stays"


@pytest.mark.long
def test_a_checkpoint_larger_than_memory_allows_can_be_streamed(tmp_path):
    """The peak follows the largest module, not the checkpoint."""
    directory = make_checkpoint(tmp_path / "big", BIG)
    root = Path(__file__).resolve().parents[2]
    code = MEMORY.format(paths=[str(root)], directory=str(directory))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    grown = json.loads(done.stdout.splitlines()[-1])
    assert whole > 400e6 and 0 < grown < 0.35 * whole, (grown, whole)


def test_the_oracle_agrees_with_the_module_and_chunks_change_nothing(tmp_path, monkeypatch):
    import adapter.verify.reference

    directory = make_checkpoint(tmp_path / "m", Shape())
    plan, checkpoint = checked_plan(directory, 3, "float32")
    reference = Reference(directory, plan, checkpoint, torch.float32, "sdpa", "cpu")
    name = "visual.blocks.1.attn.proj"
    x = torch.randn(9, plan.geometry.sizes["v_hidden"])
    (whole,) = reference.expected(plan, Group(0, 3), name, plan.claims[name], torch.nn.Identity(), x)
    weights = reference.weights(name)
    assert torch.equal(whole.values, torch.nn.functional.linear(x, weights["weight"], weights["bias"]))
    monkeypatch.setattr(adapter.verify.reference, "CHUNK", 2 * whole.values.shape[1])
    parts = list(reference.expected(plan, Group(0, 3), name, plan.claims[name], torch.nn.Identity(), x))
    assert len(parts) == 5
    assert furthest(torch.cat([p.values for p in parts]), whole.values, whole.bound)[0] <= 1
    assert torch.allclose(torch.cat([p.bound for p in parts]), whole.bound, rtol=1e-5)
