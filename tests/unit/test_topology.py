"""What is refused before any rank joins, and how the all-reduce is chosen."""

from __future__ import annotations

import pytest

from adapter.parallel import all_reduce
from adapter.parallel.all_reduce import DEEPSPEED, deepspeed_refusal, describe, quickest
from adapter.parallel.group import TORCH, Group, Route
from adapter.parallel.launchers import LAUNCHERS, Launch
from adapter.parallel.rendezvous import check_world
from policies.errors import UserError


@pytest.mark.parametrize("world, tp, words", [
    (1, 4, r"1 rank \(you started without a launcher\),.*--num_accelerators 4.*tp_size to 1$"),
    (4, 3, "4 ranks, .*whole replicas.*one of 1, 2, 4$"), (2, 3, "2 ranks, .*tp_size is 3"),
])
def test_world_that_makes_no_whole_replicas(monkeypatch, world, tp, words):
    for launcher in LAUNCHERS:
        monkeypatch.delenv(launcher.mark, raising=False) if launcher.mark else None
    with pytest.raises(UserError, match=words):
        check_world(world, tp)
    check_world(tp, tp)
    check_world(3 * tp, tp)


def test_one_rank_of_a_launcher_was_not_started_without_one(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(UserError, match="1 rank, "):
        check_world(1, 2)


@pytest.mark.parametrize("launch, tp, op, why", [
    (Launch(0, 2, 0, 2), 2, True, None),
    (Launch(0, 4, 0, 2), 4, True, "one host"),
    (Launch(0, 4, 0, 4), 2, True, "one replica"),
    (Launch(0, 2, 0, 0), 2, True, "LOCAL_SIZE not set"),
    (Launch(0, 2, 0, 2), 2, False, "compiler"),
])
def test_where_deepspeed_s_op_may_sum(monkeypatch, launch, tp, op, why):
    backend = type("Backend", (), {"shm_comm_op": object() if op else None})()
    monkeypatch.setattr(all_reduce.dist.comm, "cdb", backend)
    refusal = deepspeed_refusal(launch, tp)
    assert refusal is None if why is None else why in refusal


OURS = Route("ours", TORCH.all_reduce, TORCH.all_gather)


@pytest.mark.parametrize("ours, deepspeed, torch_group, name", [
    ((3, 100), (3, 90), (900, 600), "ours"),  # within noise: the first
    ((14, 1650), (11000, 5000), (5300, 6900), "ours"),
    ((5, 100), (2, 90), (900, 600), DEEPSPEED.name),
    ((900, 900), (2000, 90), (400, 600), TORCH.name),
    ((900, 100), (950, 1), (890, 90), "ours"),
    ((10, 90000), (10, 100), (900, 600), DEEPSPEED.name),  # small ones alike: the large one decides
])
def test_the_quickest_for_a_prompt_and_its_answer(ours, deepspeed, torch_group, name):
    times = {"ours": ours, DEEPSPEED.name: deepspeed, TORCH.name: torch_group}
    assert quickest((OURS, DEEPSPEED, TORCH), times).name == name


def test_the_only_possible_one_needs_no_figures():
    assert quickest((TORCH,), {}) is TORCH
    assert describe(TORCH, (4096, 524288), {}, {"ours": "no compiler"}) == "torch group; not ours: no compiler"
    reported = describe(OURS, (3072, 524288), {"ours": (3.4, 99.6)}, {})
    assert reported == "ours; microseconds for 3 KB and 524 KB: ours 3 and 100"
    assert "for 448 bytes and 524 KB" in describe(OURS, (448, 524288), {"ours": (3.4, 99.6)}, {})


def test_a_rank_alone_sums_nothing():
    assert all_reduce.choose(Group(0, 2), Group(0, 1), [0], Launch(0, 2, 0, 2), 4096, 1.0)[0] is TORCH
