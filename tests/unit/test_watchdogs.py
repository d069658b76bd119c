"""Who is late, how it is reported, and how that ends a command; no ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from launching import ROOT

from adapter.health import watchdog
from adapter.health.watchdog import Lateness, describe, late_ranks
from adapter.parallel.group import Group
from adapter.parallel.progress import (
    ALL_GATHER,
    ALL_REDUCE,
    BARRIER,
    BROADCAST,
    CollectiveState,
    Progress,
    open_progress,
    read_state,
)


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
    assert read_state(mine) == CollectiveState(0, False, 0, 0)
    with progress.entering(ALL_GATHER, 12):
        assert read_state(mine) == progress.state() == CollectiveState(1, True, ALL_GATHER, 12)
    with pytest.raises(KeyError), progress.entering(BARRIER, 0):
        raise KeyError
    assert read_state(mine) == CollectiveState(2, False, BARRIER, 0)
    with pytest.raises(TypeError):
        mine[0] = 5
    read = ("import sys; from adapter.parallel.progress import open_progress, read_state;"
            "print(read_state(open_progress(int(sys.argv[1]), int(sys.argv[2]))).entered)")
    done = subprocess.run([sys.executable, "-c", read, str(os.getpid()), str(progress.file.fileno())], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout.strip().endswith("2"), done.stderr


def test_one_rank_counts_nothing_and_needs_no_progress():
    x = torch.ones(3)
    assert Group(0, 1).all_reduce(x) is x and Group(0, 1).broadcast(x) is x


WAITING = CollectiveState(9, True, ALL_REDUCE, 224)
ENQUEUED = CollectiveState(9, False, ALL_REDUCE, 224)
AWAY, BEHIND = CollectiveState(8, False, ALL_REDUCE, 224), CollectiveState(8, True, ALL_REDUCE, 224)
ASTRAY, AHEAD = CollectiveState(9, True, ALL_GATHER, 8), CollectiveState(10, True, ALL_REDUCE, 224)


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
    (ENQUEUED, {1: AWAY}, {}, [1]),  # on accelerators ranks wait outside of collectives
])
def test_who_keeps_a_rank_waiting(mine, others, states, late):
    assert late_ranks(mine, others, {r: states.get(r, "sleeping") for r in others}) == late


@pytest.mark.parametrize("mine, others, words", [
    (WAITING, {1: AWAY}, "R1 has been late for 7 s at collective 9 (all-reduce of 224 values)"),
    (WAITING, {1: AWAY, 2: AWAY}, "R1, R2 have been late"),
    (WAITING, {1: ASTRAY}, "R1 has been elsewhere for 7 s: in all-gather of 8 values, this rank at collective 9"),
    (CollectiveState(9, True, BROADCAST, 1), {0: AWAY}, "R0 has been preparing requests, or is late, for 7 s"),
    (CollectiveState(9, True, BARRIER, 0), {1: AWAY}, "(barrier)"),
])
def test_a_late_rank_in_words(mine, others, words):
    assert words in describe(mine, others, {r: f"R{r}" for r in others}, 7.2)


def test_on_accelerators_only_what_was_enqueued_is_claimed():
    """A rank that has enqueued a collective may wait for an earlier one: the message names who can tell."""
    report = describe(ENQUEUED, {1: AWAY}, {1: "R1"}, 7.2, on_device=True)
    assert report.startswith("R1 has been late for 7 s at enqueued collective 9 (all-reduce of 224 values). Devices")
    assert "TORCH_NCCL_TRACE_BUFFER_SIZE" in report and "inside" not in report
    assert "NCCL" not in describe(WAITING, {1: AWAY}, {1: "R1"}, 7.2)


def test_waiting_is_reported_after_seconds_and_again_after_a_minute_and_a_stop_does_not_count(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    lateness, reported = Lateness(), []

    def pass_seconds(seconds: float, mine: CollectiveState) -> float:
        for _ in range(int(seconds / watchdog.INTERVAL_S)):
            now[0] += watchdog.INTERVAL_S
            waited = lateness.look(mine)
            if lateness.is_report_due():
                reported.append(round(waited))
        return waited

    pass_seconds(130, WAITING)
    assert reported == [5, 65, 125]
    pass_seconds(4, AHEAD)
    assert reported == [5, 65, 125]
    now[0] += 3600  # this process was stopped, or its machine asleep
    assert pass_seconds(0.5, AHEAD) < 6


def test_no_shared_memory_is_reported_and_stops_nothing(monkeypatch, caplog):
    from adapter.parallel import parallel_state, progress

    def refuse(name: str) -> int:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(progress.os, "memfd_create", refuse)
    assert parallel_state._make_progress() is None and "not permitted" in caplog.text
