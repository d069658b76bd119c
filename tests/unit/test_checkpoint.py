"""Slices read from files are the slices of the whole tensors, byte for byte."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import Shape, make_checkpoint
from safetensors.torch import load_file, save_file

from adapter.checkpoint.safetensors import SINGLE
from adapter.planning.load import checked_plan, make_plan
from policies.families.qwen2_vl import POLICY
from policies.rules import TensorSlice

SMALL = Shape(heads=6, kv_heads=2, head_dim=4, layers=1, mlp=40, vocab=37, v_heads=3, v_head_dim=4, v_layers=1)
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def whole(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor by published name, as the safetensors package reads it."""
    return {POLICY.published(n): t for f in directory.glob("*.safetensors") for n, t in load_file(f).items()}


def cut(tensor: torch.Tensor, part: TensorSlice) -> torch.Tensor:
    if part.dim is None:
        return tensor
    return torch.cat([tensor.narrow(part.dim, a, b - a) for a, b in part.ranges], dim=part.dim)


@pytest.mark.parametrize("tp", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("newer", "files"), [(False, 2), (True, 1)])
def test_every_slice_of_every_rank(tmp_path, tp, dtype, newer, files):
    """Equal to the slice of the whole tensor, in the file's dtype, in memory of its own; every byte read is counted."""
    make_checkpoint(tmp_path, SMALL, dtype, newer_names=newer, files=files)
    plan, checkpoint = checked_plan(tmp_path, tp, "float32")
    tensors, expected = whole(tmp_path), 0
    for rank in range(tp):
        for name in SMALL.tensors():
            part = plan.slice(*name.rsplit(".", 1), rank)
            got = checkpoint.read(name, part)
            assert got.dtype == dtype and got.is_contiguous()
            assert torch.equal(got, cut(tensors[name], part)), (name, rank)
            expected += got.nbytes
            assert checkpoint.bytes_read == expected
    replicated = sum(t.nbytes for n, t in tensors.items() if plan.slice(*n.rsplit(".", 1), 0).dim is None)
    kv = sum(t.nbytes for n, t in tensors.items() if ".k_proj." in n or ".v_proj." in n)
    held = sum(s.kv[1] - s.kv[0] for s in plan.heads["text"])
    total = sum(t.nbytes for t in tensors.values())
    assert expected == total + replicated * (tp - 1) + kv * (held - SMALL.kv_heads) // SMALL.kv_heads
    assert tp == 1 or expected < tp * total


def test_only_the_bytes_of_the_slice_are_asked_for(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, SMALL)
    plan, checkpoint = checked_plan(tmp_path, 3, "float32")
    asked, preadv = [], os.preadv

    def watched(fd, buffers, offset):
        asked.append((offset, sum(map(len, buffers))))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", watched)
    name, rank = "model.layers.0.self_attn.q_proj.weight", 1
    part, info = plan.slice(*name.rsplit(".", 1), rank), checkpoint.tensors[name]
    checkpoint.read(name, part)
    (start, stop), row = part.ranges[0], 4 * SMALL.hidden
    assert asked == [(info.offset + start * row, (stop - start) * row)]


def test_short_reads_are_continued(tmp_path, monkeypatch):
    """The kernel may give less than asked (beyond 2 GB, on signals)."""
    make_checkpoint(tmp_path, SMALL)
    plan, checkpoint = checked_plan(tmp_path, 2, "float32")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    tensors = whole(tmp_path)
    for name in ("visual.blocks.0.attn.qkv.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"):
        part = plan.slice(*name.rsplit(".", 1), 1)
        assert torch.equal(checkpoint.read(name, part), cut(tensors[name], part))


def test_a_rank_without_vision_heads_reads_nothing_of_them(tmp_path):
    make_checkpoint(tmp_path, SMALL)
    plan, checkpoint = checked_plan(tmp_path, 6, "float32")
    rank = next(r for r, s in enumerate(plan.heads["vision"]) if not s.owned)
    v = SMALL.v_heads * SMALL.v_head_dim
    for suffix, shape in (("qkv.weight", (0, v)), ("qkv.bias", (0,)), ("proj.weight", (v, 0))):
        owner, kind = f"visual.blocks.0.attn.{suffix}".rsplit(".", 1)
        assert checkpoint.read(f"{owner}.{kind}", plan.slice(owner, kind, rank)).shape == shape
    assert checkpoint.bytes_read == 0


@pytest.mark.parametrize("ignored", ["model.layers.0.self_attn.rotary_emb.inv_freq", "visual.rotary_pos_emb.inv_freq"])
def test_computed_tensors_of_old_releases_are_ignored(tmp_path, ignored):
    make_checkpoint(tmp_path, SMALL, files=1)
    save_file(load_file(tmp_path / SINGLE) | {ignored: torch.zeros(3)}, tmp_path / SINGLE)
    assert make_plan(tmp_path, 2, "float32")[2] == []


@pytest.mark.parametrize("present", [False, True])
def test_a_tied_head_may_be_saved_or_not(tmp_path, present):
    make_checkpoint(tmp_path, replace(SMALL, tied=True), files=1)
    if present:
        save_file(load_file(tmp_path / SINGLE) | {"lm_head.weight": torch.ones(37, 24)}, tmp_path / SINGLE)
    plan, checkpoint = checked_plan(tmp_path, 2, "float32")
    assert ("lm_head.weight" in checkpoint.tensors) == present
    assert ("lm_head", "weight") not in plan.parameters()


# Broken checkpoints. Each way of breaking one: a function of the directory, and what the message must name.
