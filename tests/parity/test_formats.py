"""Quantised weights over ranks: what one rank computes with them, since shards are cut between groups; and how far that
is from the weights themselves. In each of these jobs the self-test at start has held every layer to its bound, or it
would have ended there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import Shape, cases, make_checkpoint
from launching import launch
from safetensors.torch import load_file

from adapter.kernels import linear as kernels

WORKER = Path(__file__).with_name("worker.py")
SHAPE = Shape(heads=6, kv_heads=2, head_dim=64, layers=2, mlp=768, vocab=203, v_heads=4, v_head_dim=8, v_layers=1)
LOSS = {"int8": 0.06, "int4": 0.7}  # of the logits' spread: what such codes cost this random model, with room to spare
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(kernels.missing() is not None, reason=f"no kernels: {kernels.missing()}"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("formats")
    make_checkpoint(root / "m", SHAPE)
    return root


def run(home: Path, ranks: int, form: str) -> dict[str, torch.Tensor]:
    out = home / form
    out.mkdir(exist_ok=True)
    file = out / f"m.tp{ranks}.safetensors"
    if not file.exists():
        outcome = launch(ranks, WORKER, "--out", str(out), "--format", form, str(home / "m"),
                         launcher="fork" if ranks > 1 else "alone")
        assert outcome.code == 0, outcome.err[-5000:]
    return load_file(file)


@pytest.mark.parametrize(("ranks", "form"), [
    (2, "int8"), (3, "int4"), pytest.param(2, "int4", marks=pytest.mark.sweep),
    pytest.param(3, "int8", marks=pytest.mark.sweep),
])
def test_ranks_compute_what_one_rank_does(home, ranks, form):
    one, ours = run(home, 1, form), run(home, ranks, form)
    for case in cases():
        difference = float((one[f"{case}.logits"] - ours[f"{case}.logits"]).abs().max())
        print(f"{form}, tp {ranks}, {case}: max |logit difference| to one rank {difference:.1e}")
        assert difference <= 1e-4
        first = [result[f"{case}.tokens"][:, 0] for result in (one, ours)]
        assert torch.equal(*first)  # later ones follow activations rounded to 8 bits, where a last bit may tip a code
    assert ours["equal_on_ranks"].all()


@pytest.mark.parametrize("form", LOSS)
def test_what_the_codes_cost(home, form):
    dense, coded = run(home, 1, "dense"), run(home, 1, form)
    for case in cases():
        a, b = dense[f"{case}.logits"], coded[f"{case}.logits"]
        loss = float((a - b).square().mean().sqrt() / a.std())
        print(f"{form}, {case}: root mean square logit error {loss:.3g} of their spread")
        assert 1e-4 < loss < LOSS[form]
