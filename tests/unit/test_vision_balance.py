"""Assigning images to ranks, its cost against that of a split encoder, and what a plan says of both."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import DEFAULT, Shape, make_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from adapter.commands.plan import report
from adapter.planning.plan import DTYPE_BYTES, Plan
from adapter.planning.vision_balance import FLOPS_PER_BYTE, Assignment, assign, cost, frames_of
from policies.families.qwen2_vl import POLICY

ROOT = Path(__file__).parents[2]
GRIDS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9).map(lambda n: 2 * n), st.integers(1, 9).map(
    lambda n: 2 * n)), min_size=1, max_size=8)
FEW = st.lists(st.tuples(st.just(1), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6)


def plan_of(shape: Shape = DEFAULT, tp: int = 2, vision: str = "auto", dtype: str = "float32") -> Plan:
    return Plan(POLICY, POLICY.geometry(shape.config()), tp, dtype, vision)


def price(plan: Plan):
    return cost(plan, DTYPE_BYTES[plan.dtype])


def test_a_video_is_its_frames_and_an_image_one_frame():
    assert frames_of([[1, 4, 8], [3, 4, 6], [1, 6, 4]]) == ((4, 8), (4, 6), (4, 6), (4, 6), (6, 4))


@given(GRIDS, st.integers(1, 9))
def test_an_assignment_is_a_partition_and_the_same_for_everyone(grid, ranks):
    assignment = assign(grid, ranks)
    assert len(assignment.shares) == ranks and all(list(s) == sorted(s) for s in assignment.shares)
    assert sorted(i for share in assignment.shares for i in share) == list(range(len(frames_of(grid))))
    assert sum(assignment.patches(r) for r in range(ranks)) == sum(t * h * w for t, h, w in grid)
    assert assign([tuple(row) for row in grid], ranks) == assignment  # whatever the container


@given(FEW, st.integers(1, 3))
def test_the_fullest_rank_is_within_grahams_bound_of_the_best_assignment(grid, ranks):
    assignment = assign(grid, ranks)
    best = min(max(sum(n for n, r in zip(assignment.sizes, who, strict=True) if r == rank) for rank in range(ranks))
               for who in itertools.product(range(ranks), repeat=len(assignment.sizes)))
    fullest = max(assignment.patches(r) for r in range(ranks))
    assert 3 * ranks * fullest <= (4 * ranks - 1) * best


@given(GRIDS, st.integers(1, 9))
def test_no_rank_is_idle_while_another_has_two_frames(grid, ranks):
    counts = [len(share) for share in assign(grid, ranks).shares]
    assert min(counts) > 0 or max(counts) == 1


def test_the_largest_goes_first_and_the_first_rank_wins_a_tie():
    assert assign([[1, 2, 2], [1, 4, 4], [1, 2, 4], [1, 2, 2]], 2).shares == ((1,), (0, 2, 3))
    assert assign([[3, 4, 4]], 2).shares == ((0, 2), (1,))
    assert assign([[1, 4, 4]], 3).shares == ((0,), (), ())


def test_cost_by_hand():
    """16 heads of 4 over 3 ranks: 5, 5 and 6; written down from the shapes of the model, not from the table."""
    shape = Shape()
    found = price(plan_of(shape, 3))
    v, out, layers = 64, shape.hidden, shape.v_layers
    patch = 3 * 2 * 14 * 14 * v
    linear = layers * (4 * v * v + 2 * v * 4 * v) + (4 * v * 4 * v + 4 * v * out) / 4
    assert found.whole.patch == 2 * (patch + linear)
    assert found.whole.pair == layers * 16 * (2 * 4 + 2 * 4)
    assert [part.pair for part in found.parts] == [layers * heads * 16 for heads in (5, 5, 6)]
    assert sum(p.patch - 2 * patch for p in found.parts) == pytest.approx(2 * linear)  # the patch embedding on each
    assert found.reduced == pytest.approx(4 * (2 * layers * v + out / 4) * 2 * 2 / 3)
    assert found.gathered == pytest.approx(4 * out / 4 * 2 / 3)
    grid = [[1, 4, 8], [2, 4, 6]]
    assignment = assign(grid, 3)
    one = found.whole.patch * 32 + found.whole.pair * 32 ** 2
    assert found.data(assignment) == pytest.approx(one + FLOPS_PER_BYTE * found.gathered * 80)
    slowest = max(p.patch * 80 + p.pair * (32 ** 2 + 2 * 24 ** 2) for p in found.parts)
    assert found.tensor(assignment.sizes) == pytest.approx(slowest + FLOPS_PER_BYTE * found.reduced * 80)


def published(tp: int) -> Plan:
    """The vision encoder of every published size beside a small language model, in bfloat16."""
    return plan_of(Shape(heads=28, kv_heads=4, head_dim=128, v_head_dim=80, v_layers=32), tp, dtype="bfloat16")


@pytest.mark.parametrize(("tp", "grid", "data"), [
    (2, [[1, 32, 32]], False),  # a single image is never one rank's work
    (2, [[1, 32, 32]] * 2, True), (2, [[1, 32, 32], [1, 16, 32]], False), (4, [[1, 32, 32]] * 3, False),
    (2, [[16, 16, 16]], True), (4, [[16, 16, 16]], True), (4, [[9, 16, 16]], False),
    (3, [[1, 32, 32]] * 6, True),
])
def test_what_auto_chooses(tp, grid, data):
    assert price(published(tp)).prefers_data(assign(grid, tp)) is data


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([2, 3, 4, 8]))
def test_a_single_frame_is_never_one_ranks_work(h, w, tp):
    assert not price(plan_of(tp=tp)).prefers_data(assign([[1, 2 * h, 2 * w]], tp))


def test_one_rank_has_nothing_to_choose():
    found = price(plan_of(tp=1))
    assert found.reduced == found.gathered == 0 and found.parts == (found.whole,)
    assert not found.prefers_data(Assignment(((2, 2), (2, 2)), ((0, 1),)))


@pytest.mark.parametrize("vision", ["data", "auto"])
@pytest.mark.parametrize("tp", [2, 3])
def test_every_rank_holds_the_encoder_once(vision, tp):
    shape, plan = Shape(), plan_of(Shape(), tp, vision)
    encoder = sum(4 * _count(s) for n, s in shape.tensors().items() if n.startswith("visual."))
    split = report(plan.divided, [])
    facts = report(plan, [])
    assert facts["vision"]["mode"] == vision and facts["vision"]["held_bytes"] == [encoder] * tp
    for rank, (row, other) in enumerate(zip(facts["ranks"], split["ranks"], strict=True)):
        more = facts["vision"]["replica_bytes"][rank]
        assert row["weight_bytes"] == other["weight_bytes"] + more and 0 < more < encoder
        assert split["vision"]["held_bytes"][rank] + more == encoder and split["vision"]["replica_bytes"][rank] == 0
    for tensor in facts["tensors"]:
        assert (tensor["rule"] == "Replicated") >= tensor["name"].startswith("visual.")
        assert not tensor["name"].startswith("visual.") or (tensor["dim"] is None and tensor["why"])
    heads = [row["vision_heads"] for row in facts["ranks"]]
    assert heads == ([[0, 16]] * tp if vision == "data" else [row["vision_heads"] for row in split["ranks"]])
    assert facts["collectives"]["per_layer"]["visual.blocks"] == (0 if vision == "data" else 2)
    assert facts["problems"] == [] and facts["valid_tp_sizes"] == split["valid_tp_sizes"]


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def test_the_command_says_what_it_costs(tmp_path):
    make_checkpoint(tmp_path / "m")
    file = tmp_path / "c.yaml"
    file.write_text("model: {path: m, dtype: float32}\ntensor_parallel: {tp_size: 2, vision: auto}\n")
    done = subprocess.run([sys.executable, "launch/plan.py", "--config", str(file)], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for words in ("vision encoder (auto): whole on each rank", "GB more than split", "in GFLOP, what it sends counted"):
        assert words in done.stdout, done.stdout
    line = r"^vision, {}: +split \(tensor\) +([\d.]+), whole images \(data\) +([\d.]+); cheaper: (\w+)$"
    one, two = (re.search(line.format(what), done.stdout, re.MULTILINE)
                for what in ("1 image of 1024 patches", "2 images of 1024"))
    assert one and two and (one[3], two[3]) == ("tensor", "data") and float(one[2]) > float(one[1]), done.stdout
    assert float(two[1]) == pytest.approx(price(plan_of()).tensor([1024, 1024]) / 1e9, rel=0.01)
    facts = json.loads(subprocess.run([sys.executable, "launch/plan.py", "--json", "--config", str(file)], cwd=ROOT,
                                      capture_output=True, text=True, timeout=60).stdout)
    example = next(e for e in facts["vision"]["examples"] if e["what"] == "2 images of 1024")
    assert example["tensor"] == price(plan_of()).tensor([1024, 1024]) and example["auto"] == "data"


def test_another_word_is_an_error_that_names_the_three(tmp_path):
    make_checkpoint(tmp_path / "m")
    file = tmp_path / "c.yaml"
    file.write_text("model: {path: m}\ntensor_parallel: {tp_size: 2, vision: datum}\n")
    done = subprocess.run([sys.executable, "launch/plan.py", "--config", str(file)], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 2 and "tensor_parallel.vision" in done.stderr
    assert all(word in done.stderr for word in ("tensor", "data", "auto", "datum")) and "Traceback" not in done.stderr
