"""Two ranks on AWQ, GPTQ and FP8 files against plain Transformers in one process on the dense model they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from families import make_family
from launching import launch
from quantised import KINDS, quantised
from safetensors.torch import load_file

from adapter.checkpoint.sharded import Shards
from adapter.commands.shard import write_shards
from adapter.planning.load import checked_plan
from policies.rules import TensorSlice

WORKER = Path(__file__).with_name("worker.py")
MODELS = {"awq": "qwen2_5_vl", "gptq4": "qwen2_vl", "fp8": "qwen3_vl"}
BATCH = ("--only", "batch")  # text, images and a video in one, padded
pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """files/NAME: quantised; meant/NAME: the dense model; and what both give."""
    root = tmp_path_factory.mktemp("quantised")
    for name, family in MODELS.items():
        dense = make_checkpoint(root / "dense" / name) if family == "qwen2_vl" else make_family(
            root / "dense" / name, family, intermediate_size=208, num_hidden_layers=2)
        quantised(dense, root / "files" / name, KINDS[name], decoded=root / "meant" / name)
    plain = launch(1, WORKER, "--plain", *BATCH, "--out", str(root), *(str(root / "meant" / n) for n in MODELS),
                   launcher="alone")
    assert plain.code == 0, plain.err[-3000:]
    ours = launch(2, WORKER, *BATCH, "--out", str(root), *(str(root / "files" / n) for n in MODELS))
    assert ours.code == 0, ours.err[-6000:]
    assert ours.err.count("note: the files are quantised (") == 3, ours.err[-3000:]
    assert "Transformers' own loop" not in ours.err, ours.err[-3000:]
    return root


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_equal_one_process(workplace, name):
    plain, ours = (load_file(workplace / f"{name}.{what}.safetensors") for what in ("plain", "tp2"))
    largest = float(plain["batch.logits"].abs().max())
    difference = float((plain["batch.logits"] - ours["batch.logits"]).abs().max())
    print(f"{name}: max |logit difference| {difference:.1e} of {largest:.1f}")
    assert difference <= 1e-4 * largest and plain["batch.logits"].std() > 0.3
    assert torch.equal(plain["batch.tokens"], ours["batch.tokens"])
    assert ours["equal_on_ranks"].all()


def test_shards_of_quantised_files_are_dense(workplace, tmp_path):
    """`shard` decodes once; its config.json still says awq, and its files are what the ranks would hold."""
    plan, checkpoint = checked_plan(workplace / "files" / "awq", 2, "bfloat16")
    write_shards(plan, checkpoint, tmp_path / "shards")
    again, shards = checked_plan(tmp_path / "shards", 2, "bfloat16")
    assert isinstance(shards, Shards) and again.weight_bytes(1) == plan.weight_bytes(1)
    name = "model.layers.0.mlp.down_proj.weight"
    part = plan.slice(*name.rsplit(".", 1), 1)
    assert isinstance(part, TensorSlice) and torch.equal(shards.load(1)[name], checkpoint.read(name, part).bfloat16())
