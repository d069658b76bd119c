"""Whole vision encoders over real ranks: what one process computes, with one collective where images are assigned.

Heads that do not divide (16 over 3), ranks without a vision head (2 over 3), ranks without a picture. The reference is
plain Transformers, of the same release.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoints import Shape, make_checkpoint
from families import make_family
from launching import launch
from safetensors.torch import load_file

from adapter.planning.load import make_plan
from adapter.planning.vision_balance import assign, cost

WORKER, PLAIN = Path(__file__).with_name("vision_worker.py"), Path(__file__).with_name("worker.py")
OLD = os.environ.get("QWENVL_TP_OLD_PYTHON", "")
MODELS = {"heads28": Shape(), "few_vision_heads": Shape(heads=6, kv_heads=2, v_heads=2, v_head_dim=8)}
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
CASES = ("text", "image", "two_images", "video", "batch")
RUNS = [(tp, name, vision) for tp, name in ((2, "heads28"), *((3, name) for name in (*MODELS, *FAMILIES)))
        for vision in ("data", "auto")]
SWEPT = {run for run in RUNS if run[0] == 2 or (run[1] in FAMILIES and run[2] == "auto") or run[1] == "qwen3_5"}
pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("vision")
    for name, shape in MODELS.items():
        make_checkpoint(root / name, shape)
        make_checkpoint(root / "published" / name, shape)
    for name in FAMILIES:
        make_family(root / name, name)
        (root / "published" / name).symlink_to(root / name)
    models = [str(root / name) for name in (*MODELS, *FAMILIES)]
    outcome = launch(1, PLAIN, "--plain", "--out", str(root), *models, launcher="alone")
    assert outcome.code == 0, outcome.err[-3000:]
    return root


@cache
def job(root: Path, tp: int, swept: bool) -> dict[tuple[str, str], dict]:
    """Every run of this tp size that is swept, or every other one."""
    pairs = [word for run in RUNS if run[0] == tp and (run in SWEPT) == swept
             for word in (str(root / run[1]), run[2])]
    outcome = launch(tp, WORKER, str(root), *pairs, timeout=600)
    assert outcome.code == 0, outcome.err[-6000:]
    rows = [json.loads(line) for line in outcome.out.splitlines() if line.startswith('{"model"')]
    return {(row["model"], row["vision"]): row for row in rows}


@pytest.fixture(params=[pytest.param(run, id="-".join(map(str, run)), marks=[pytest.mark.sweep] if run in SWEPT else [])
                        for run in RUNS], scope="module")
def ran(request, workplace):
    """(plain results, ours, facts, plan) of one run."""
    tp, name, vision = request.param
    facts = job(workplace, tp, request.param in SWEPT)[name, vision]
    plan, *_ = make_plan(workplace / name, tp, "float32", vision)
    ours = load_file(workplace / f"{name}.tp{tp}.{vision}.safetensors")
    return load_file(workplace / f"{name}.plain.safetensors"), ours, facts, plan


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_equal_one_process(ran, case):
    plain, ours, _, plan = ran
    assert plain[f"{case}.logits"].std() > 0.3, "the reference itself must say something"
    difference = float((plain[f"{case}.logits"] - ours[f"{case}.logits"]).abs().max())
    largest = float(plain[f"{case}.logits"].abs().max())
    print(f"tp {plan.tp_size}, vision {plan.vision}, {case}: max |logit difference| {difference:.1e} of {largest:.1f}")
    assert difference <= 1e-4 * largest
    assert torch.equal(plain[f"{case}.tokens"], ours[f"{case}.tokens"])


def test_beams_and_samples_and_every_rank_alike(ran):
    plain, ours, _, _ = ran
    assert torch.equal(plain["beams.tokens"], ours["beams.tokens"])
    assert ours["equal_on_ranks"].all()


def test_a_loaded_model_computes_the_same(ran):
    assert ran[2]["loaded"] <= 1e-5


def test_what_a_caller_computed_for_all_pictures_is_refused(ran):
    *_, facts, plan = ran
    assert plan.vision == "auto" or all(word in facts["refused"] for word in ("position_ids", "tensor_parallel.vision"))


def test_each_call_takes_its_mode_and_an_assigned_one_has_one_collective(ran):
    """Counted on every rank, also without a picture: cases image, two images, video, and both of the batch."""
    *_, facts, plan = ran
    grids = [[[1, 8, 6]], [[1, 4, 8], [1, 6, 4]], [[3, 4, 6]], [[1, 8, 6], [1, 4, 8], [1, 6, 4]], [[3, 4, 6]]]
    assert facts["grids"] == grids
    price = cost(plan, 4)
    assigned = [plan.vision == "data" or price.prefers_data(assign(grid, plan.tp_size)) for grid in grids]
    assert plan.vision == "data" or set(assigned) == {True, False}, "the cases of auto are of both kinds"
    geometry = plan.geometry
    split = 2 * geometry.layers[plan.policy.encoder.stack] + 1 + geometry.injected_layers  # mergers add one each
    expected = [1 if one else split for one in assigned]
    assert [row[:-2] for row in facts["ranks"]] == [expected] * plan.tp_size
    assert plan.tp_size == 2 or any(not share for share in assign(grids[1], plan.tp_size).shares)


def test_the_encoder_is_held_once(ran):
    """Storage that parameters live in: a view of a part is no second copy."""
    *_, facts, plan = ran
    for rank, row in enumerate(facts["ranks"]):
        assert row[-2] == row[-1] == plan.weight_bytes(rank)


@pytest.mark.long
@pytest.mark.skipif(not OLD, reason="QWENVL_TP_OLD_PYTHON is not set")
def test_the_oldest_release(tmp_path):
    """Its encoder returns a tensor, and attends to all pieces at once under a mask."""
    for where in (tmp_path / "m", tmp_path / "published" / "m"):
        make_checkpoint(where)
    for n, script, args, launcher in ((1, PLAIN, ["--plain", "--out", str(tmp_path), str(tmp_path / "m")], "alone"),
                                      (2, WORKER, [str(tmp_path), str(tmp_path / "m"), "data", str(tmp_path / "m"),
                                                   "auto"], "fork")):
        outcome = launch(n, script, *args, python=OLD, launcher=launcher, timeout=400)
        assert outcome.code == 0, outcome.err[-3000:]
    plain = load_file(tmp_path / "m.plain.safetensors")
    for vision in ("data", "auto"):
        ours = load_file(tmp_path / f"m.tp2.{vision}.safetensors")
        for case in CASES:
            assert (plain[f"{case}.logits"] - ours[f"{case}.logits"]).abs().max() <= 1e-4, (vision, case)
            assert torch.equal(plain[f"{case}.tokens"], ours[f"{case}.tokens"]), (vision, case)
        assert ours["equal_on_ranks"].all()
