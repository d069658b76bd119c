"""Digests, who disagrees, who is late, and how these end a command; no ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from launching import ROOT

from adapter.checkpoint.digest import unlike
from adapter.config.schema import TensorParallelSection
from adapter.health import watchdog
from adapter.health.desync import (
    FEATURES,
    IDS,
    LEAVING,
    POSITIONS,
    TOKEN,
    Digests,
    Disagreement,
    disagreements,
    message,
)
from adapter.health.watchdog import Lateness, describe, late_ranks
from adapter.parallel.group import Group
from adapter.parallel.progress import (
    ALL_GATHER,
    ALL_REDUCE,
    BARRIER,
    BROADCAST,
    Progress,
    Standing,
    open_progress,
    standing,
)


def digest(*values: object) -> int:
    digests = Digests()
    for value in values:
        digests.add(IDS, value)
    return digests.value(IDS)


def test_digest_sees_order_shape_dtype_and_the_last_bit():
    x = torch.arange(6)
    different = [x, x.flip(0), x.view(2, 3), x.int(), x.float(), x.float().bfloat16(), x.float() + 1e-6, None, x[:0]]
    assert len({digest(d) for d in different}) == len(different)
    assert digest(x.float().bfloat16()) == digest(x.float().bfloat16().clone())
    assert digest(x.view(2, 3).t()) == digest(x.view(2, 3).t().contiguous())
    assert digest(torch.arange(6).view(1, 6)[:, -1]) == digest(torch.tensor([5])), "the new token of one row"
    assert digest([x, {"a": x}]) != digest([x, {"b": x}])
    assert digest(x, x) != digest(x)
    assert -(2**63) <= digest(x) < 2**63


@pytest.mark.parametrize("column, ranks", [
    ([7, 7, 7], ()), ([7, 8, 7], (1,)), ([8, 7, 7], (0,)), ([7, 8], (1,)), ([1, 2, 3], (1, 2)), ([1, 1, 2, 2], (2, 3)),
    ([1, 2, 2, 3], (0, 3)),
])
def test_ranks_unlike_the_majority_and_ties_go_with_rank_0(column, ranks):
    assert unlike(column) == ranks


def test_the_earliest_step_is_named_and_what_follows_from_it_is_not():
    labels = [(1, POSITIONS), (1, FEATURES), (1, TOKEN), (2, POSITIONS), (2, TOKEN), (2, LEAVING), (3, IDS)]
    same = [1, 2, 3, 4, 5, 0, 6]
    assert disagreements(labels, [same] * 3) == []
    assert disagreements(labels, [same, [1, 2, 3, 4, 9, 1, 9], same]) == [
        Disagreement(2, TOKEN, (1,)), Disagreement(2, LEAVING, (1,))]
    assert disagreements(labels, [same, [1, 9, 3, 4, 9, 1, 9], same]) == [Disagreement(1, FEATURES, (1,))]
    assert disagreements(labels, [same, [*same[:6], 9], same]) == [Disagreement(3, IDS, (1,))]


def test_message_names_step_quantity_ranks_and_what_to_do():
    said = message([Disagreement(5, TOKEN, (1, 3)), Disagreement(5, LEAVING, (1,))])
    assert "step 5" in said and "sampled token on ranks 1, 3, end of generation on rank 1" in said
    assert "same generation arguments" in said


@pytest.mark.parametrize("value", [-1, 1.0, True, "1"])
def test_desync_check_is_a_whole_number(value):
    assert TensorParallelSection(desync_check=3).desync_check == 3
    with pytest.raises(ValueError, match="desync_check"):
        TensorParallelSection(desync_check=value)


def test_a_failed_check_is_a_message_and_exit_code_1():
    code = """
        import argparse
        from adapter.commands import common
        from policies.errors import CheckFailed
        def main(args, results):
            raise CheckFailed("rank 1 is not like the others")
        common.run(main, argparse.ArgumentParser())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: rank 1 is not like the others" in done.stderr and "Traceback" not in done.stderr


def test_progress_is_read_by_another_process_and_has_no_name():
    progress = Progress()
    mine = open_progress(os.getpid(), progress.file.fileno())
    assert standing(mine) == Standing(0, False, 0, 0)
    with progress.entering(ALL_GATHER, 12):
        assert standing(mine) == progress.standing() == Standing(1, True, ALL_GATHER, 12)
    with pytest.raises(KeyError), progress.entering(BARRIER, 0):
        raise KeyError
    assert standing(mine) == Standing(2, False, BARRIER, 0)
    with pytest.raises(TypeError):
        mine[0] = 5
    read = ("import sys; from adapter.parallel.progress import open_progress, standing;"
            "print(standing(open_progress(int(sys.argv[1]), int(sys.argv[2]))).entered)")
    done = subprocess.run([sys.executable, "-c", read, str(os.getpid()), str(progress.file.fileno())], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout.strip().endswith("2"), done.stderr


def test_one_rank_counts_nothing_and_needs_no_progress():
    x = torch.ones(3)
    assert Group(0, 1).all_reduce(x) is x and Group(0, 1).broadcast(x) is x


WAITING = Standing(9, True, ALL_REDUCE, 224)
AWAY, BEHIND = Standing(8, False, ALL_REDUCE, 224), Standing(8, True, ALL_REDUCE, 224)
ASTRAY, AHEAD = Standing(9, True, ALL_GATHER, 8), Standing(10, True, ALL_REDUCE, 224)


@pytest.mark.parametrize("mine, others, states, late", [
    (WAITING, {1: WAITING, 2: WAITING}, {}, []),
    (WAITING, {1: AWAY, 2: WAITING}, {}, [1]),
    (WAITING, {1: WAITING, 2: WAITING}, {2: "stopped"}, [2]),
    (WAITING, {1: AHEAD, 2: AHEAD}, {}, []),
    (WAITING, {1: BEHIND, 2: AWAY}, {}, [2]),  # rank 1 waits for rank 2 itself
    (WAITING, {1: BEHIND, 2: BEHIND}, {1: "stopped"}, [1]),
    (WAITING, {1: BEHIND, 2: BEHIND}, {}, [1, 2]),
    (WAITING, {1: ASTRAY, 2: WAITING}, {}, [1]),
    (WAITING, {1: ASTRAY, 2: AWAY}, {}, [2]),
    (AWAY, {1: AWAY, 2: WAITING}, {1: "stopped"}, []),  # this rank keeps the others waiting
    (Standing(9, False, ALL_REDUCE, 224), {1: AWAY}, {}, [1]),  # on accelerators ranks wait outside of collectives
])
def test_who_keeps_a_rank_waiting(mine, others, states, late):
    assert late_ranks(mine, others, {r: states.get(r, "sleeping") for r in others}) == late


@pytest.mark.parametrize("mine, others, words", [
    (WAITING, {1: AWAY}, "R1 has been late for 7 s at collective 9 (all-reduce of 224 values)"),
    (WAITING, {1: AWAY, 2: AWAY}, "R1, R2 have been late"),
    (WAITING, {1: ASTRAY}, "R1 has been elsewhere for 7 s: in all-gather of 8 values, this rank at collective 9"),
    (Standing(9, True, BROADCAST, 1), {0: AWAY}, "R0 has been preparing requests, or is late, for 7 s"),
    (Standing(9, True, BARRIER, 0), {1: AWAY}, "(barrier)"),
])
def test_a_late_rank_in_words(mine, others, words):
    assert words in describe(mine, others, {r: f"R{r}" for r in others}, 7.2)


def test_waiting_is_said_after_seconds_and_again_after_a_minute_and_a_stop_does_not_count(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    lateness, said = Lateness(), []

    def pass_seconds(seconds: float, mine: Standing) -> float:
        for _ in range(int(seconds / watchdog.INTERVAL_S)):
            now[0] += watchdog.INTERVAL_S
            waited = lateness.look(mine)
            if lateness.is_time_to_say():
                said.append(round(waited))
        return waited

    pass_seconds(130, WAITING)
    assert said == [5, 65, 125]
    pass_seconds(4, AHEAD)
    assert said == [5, 65, 125]
    now[0] += 3600  # this process was stopped, or its machine asleep
    assert pass_seconds(0.5, AHEAD) < 6


def test_no_shared_memory_is_said_and_stops_nothing(monkeypatch, caplog):
    from adapter.parallel import parallel_state, progress

    def refuse(name: str) -> int:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(progress.os, "memfd_create", refuse)
    assert parallel_state._make_progress() is None and "not permitted" in caplog.text
