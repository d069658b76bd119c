"""fp32 parity with one process: real launcher, real ranks, every tp_size, both head layouts, both encoders.

One job per tp_size runs every model and case; the tests read its results. The reference is plain Transformers.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoints import Shape, make_checkpoint
from launching import launch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("worker.py")
WIDE, NARROW = Shape(heads=28, kv_heads=4), Shape(heads=12, kv_heads=2, mlp=200, vocab=199)
MODELS = {  # name -> (shape, newer names, files, tp sizes)
    "heads28": (WIDE, False, 2, (1, 2, 3, 4, 5, 7, 8)),
    "heads28_tied": (Shape(heads=28, kv_heads=4, tied=True), True, 1, (2, 4, 5)),
    "heads12": (NARROW, True, 3, (2, 4)),
    "heads12_tied": (Shape(heads=12, kv_heads=2, mlp=200, vocab=199, tied=True), False, 1, (2, 3, 4, 6)),
    "few_vision_heads": (Shape(heads=6, kv_heads=2, v_heads=2), False, 1, (3,)),  # one rank without a vision head
}
CASES = ("text", "image", "two_images", "video", "batch")
RUNS = sorted({(tp, name) for name, (*_, sizes) in MODELS.items() for tp in sizes})
SWEEP = {2, 4, 5, 6, 7}  # tp sizes that only `-m sweep` runs; the others are the ends and a straddling one


def marked(tp: int, *values, id: str | None = None):
    return pytest.param(*(values or (tp,)), id=id, marks=[pytest.mark.sweep] if tp in SWEEP else [])


pytestmark = pytest.mark.ranks


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    for name, (shape, newer, files, _) in MODELS.items():
        make_checkpoint(root / name, shape, newer_names=newer, files=files)
        make_checkpoint(root / "published" / name, shape)  # the only names Transformers before 4.52 reads by itself
    published = (str(root / "published" / name) for name in MODELS)
    outcome = launch(1, WORKER, "--plain", "--out", str(root), *published, launcher="alone")
    assert outcome.code == 0, outcome.err[-3000:]
    return root


@cache
def job(root: Path, tp: int) -> None:
    names = [str(root / n) for n, (*_, sizes) in MODELS.items() if tp in sizes]
    launcher = "fork" if tp > 1 else "alone"
    outcome = launch(tp, WORKER, "--out", str(root), *names, launcher=launcher, timeout=600)
    assert outcome.code == 0, outcome.err[-6000:]


@pytest.fixture(params=[marked(tp, (tp, name), id=f"tp{tp}-{name}") for tp, name in RUNS], scope="session")
def pair(request, workplace):
    """(reference, ours, tp_size, shape) of one run."""
    tp, name = request.param
    job(workplace, tp)
    ours = load_file(workplace / f"{name}.tp{tp}.safetensors")
    return load_file(workplace / f"{name}.plain.safetensors"), ours, tp, MODELS[name][0]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_equal_one_process(pair, case):
    plain, ours, tp, shape = pair
    assert plain[f"{case}.logits"].std() > 0.3, "the reference itself must say something"
    difference = float((plain[f"{case}.logits"] - ours[f"{case}.logits"]).abs().max())
    print(f"tp {tp}, {shape.heads}/{shape.kv_heads} heads, {case}: max |logit difference| {difference:.1e}")
    assert difference <= 1e-4
    assert torch.equal(plain[f"{case}.tokens"], ours[f"{case}.tokens"])


def test_beams_and_positional_inputs_equal_one_process(pair):
    plain, ours, _, _ = pair
    assert torch.equal(plain["beams.tokens"], ours["beams.tokens"])
    assert torch.equal(plain["positional.tokens"], ours["positional.tokens"])


def test_every_rank_has_the_same_bits_and_draws(pair):
    """Logits, tokens and samples, although each rank had set another seed."""
    _, ours, _, _ = pair
    assert ours["equal_on_ranks"].all()


@pytest.mark.parametrize("tp", [marked(tp) for tp in MODELS["heads28"][-1] if tp > 1])
def test_sample_does_not_depend_on_tp_size(workplace, tp):
    job(workplace, 1)
    job(workplace, tp)
    one, ours = (load_file(workplace / f"heads28.tp{n}.safetensors")["sampled.tokens"] for n in (1, tp))
    assert torch.equal(one, ours)


def test_ranks_read_their_slices_and_nothing_else(pair):
    """fp32 file to fp32 shard: bytes read are bytes held, and all ranks hold the model plus declared replicas."""
    _, ours, tp, shape = pair
    held, read = ours["bytes"].view(tp, 2).unbind(1)
    whole = sum(4 * torch.Size(s).numel() for s in shape.tensors().values())
    assert torch.equal(held, read)
    assert whole <= int(held.sum()) <= whole + (tp - 1) * _replicable_bytes(shape)
    assert int(held.max()) < whole or tp == 1


def _replicable_bytes(shape: Shape) -> int:
    """What one more rank may hold again: norms, row-parallel biases, the patch embedding, KV projections."""
    whole = ("norm", "ln_q", "patch_embed", "attn.proj.bias", "fc2.bias", "mlp.2.bias", "k_proj", "v_proj")
    return sum(4 * torch.Size(s).numel() for n, s in shape.tensors().items() if any(w in n for w in whole))


