"""Batches over replicas: each taken once and collected once, whatever comes in between; tallies; the next one ahead."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from datetime import timedelta

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import ROOT
from torch.distributed import HashStore, PrefixStore, TCPStore
from transformers import GenerationConfig

from adapter.config.load import from_dict, parse_request
from adapter.parallel.group import Group
from adapter.parallel.parallel_state import Mpu
from adapter.requests import scheduler
from adapter.requests.batching import Generated, Limits
from adapter.requests.results import Printed, Recorded
from adapter.requests.runner import Tally, _judged, _work, answer, make_processor, read_ahead, split
from adapter.requests.scheduler import BatchQueue, ProgressTicks, join_queue
from policies.errors import CheckFailed

DEMO = ROOT / "launch" / "demo" / "checkpoint"


def rows_of(number, replica=0):
    return [{"id": str(number), "answer": "→ 🟦", "by": replica}]


@pytest.fixture(scope="module")
def server():
    return TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


@pytest.fixture
def connect(server, request):
    """A client of its own each time, of a part of the server's that no other test has."""
    return lambda: PrefixStore(request.node.name, TCPStore("127.0.0.1", server.port, wait_for_workers=False))


@settings(deadline=None)
@given(st.data(), st.integers(0, 9), st.integers(1, 4))
def test_every_batch_is_taken_once_and_collected_once(data, batches, replicas):
    store = HashStore()
    queues = [BatchQueue(store, batches, r, replicas) for r in range(replicas)]
    takes, held = [d.take() for d in queues], [[] for _ in queues]
    taken, collected = [], []

    def step(replica, kind):
        if kind == "take" and (number := next(takes[replica], None)) is not None:
            held[replica].append(number)
            taken.append(number)
        elif kind == "post" and held[replica]:
            number = held[replica].pop(0)
            queues[replica].post(number, rows_of(number, replica))
        elif kind == "collect":
            collected.extend(queues[0].collect())
        assert queues[0].finished() == (len(taken) == batches and not any(held))

    kinds = st.tuples(st.integers(0, replicas - 1), st.sampled_from(["take", "post", "collect"]))
    for replica, kind in data.draw(st.lists(kinds, max_size=30)):
        step(replica, kind)
    for kind in ["take", "post"] * (batches + 1):
        for replica in range(replicas):
            step(replica, kind)
    step(0, "collect")
    assert sorted(taken) == list(range(batches))
    assert sorted(number for number, _ in collected) == sorted(taken)
    assert all([row["id"] for row in rows] == [str(number)] for number, rows in collected)
    assert all(queue.finished() for queue in queues) and not list(queues[0].collect())
    assert not any(store.check([f"{key}/{n}"]) for n in range(batches) for key in ("rows", "replica"))


@pytest.mark.parametrize("batches, expected", [(1, [[0], [], []]), (3, [[0], [1], [2]]), (5, [[0, 3, 4], [1], [2]])])
def test_each_replica_has_a_batch_however_late_it_comes(batches, expected):
    store = HashStore()
    queues = [BatchQueue(store, batches, r, 3) for r in range(3)]
    assert [list(queue.take()) for queue in queues] == expected


def play(store, replica, replicas, batches, pause):
    """What a replica does, without the model."""
    queue = BatchQueue(store, batches, replica, replicas)
    for number in queue.take():
        time.sleep(pause * (1 + number % 3))
        queue.post(number, rows_of(number, replica))
        if replica == 0:
            yield from queue.collect()
    while not queue.finished():
        time.sleep(0.002)
        if replica == 0:
            yield from queue.collect()
    if replica == 0:
        yield from queue.collect()


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_replicas_with_clients_of_their_own(connect, kind):
    def other(replica):
        for _ in play(connect(), replica, 4, 60, 0.001):
            raise AssertionError("only rank 0 collects")

    make = threading.Thread if kind == "threads" else multiprocessing.get_context("fork").Process
    others = [make(target=other, args=(r,)) for r in (1, 2, 3)]
    for one in others:
        one.start()
    collected = list(play(connect(), 0, 4, 60, 0.001))
    for one in others:
        one.join(20)
        assert not one.is_alive()
    assert sorted(number for number, _ in collected) == list(range(60))
    assert all(rows[0]["id"] == str(number) for number, rows in collected)
    assert {rows[0]["by"] for _, rows in collected} == {0, 1, 2, 3}


def test_a_replica_that_makes_no_step_is_named_and_what_is_posted_is_not(connect, monkeypatch):
    queues = [BatchQueue(connect(), 4, r, 3) for r in range(3)]
    takes = [d.take() for d in queues]
    assert [next(take) for take in takes] == [0, 1, 2]
    assert next(takes[1]) == 3
    queues[0].post(0, rows_of(0))
    assert [number for number, _ in queues[0].collect()] == [0]
    queues[2].post(2, rows_of(2))  # which nobody collects
    monkeypatch.setattr(scheduler, "TIMEOUT", timedelta(seconds=0.1))
    for waiting in (queues[0], queues[2]):  # rank 0, which collects, and the first rank of a replica, which does not
        assert not waiting.finished()
        time.sleep(0.15)
        with pytest.raises(CheckFailed) as error:
            waiting.finished()
        assert "no replica has made a step for 0:00:00.1" in str(error.value)
        assert "still out: batch 2 (replica 1), batch 4 (replica 1). Look" in str(error.value)


def test_a_slow_replica_is_waited_for_as_long_as_it_gives_signs(monkeypatch):
    store = HashStore()
    waiting, slow = BatchQueue(store, 1, 1, 2), BatchQueue(store, 1, 0, 2)
    next(slow.take())
    steps = ProgressTicks(slow)
    monkeypatch.setattr(scheduler, "TIMEOUT", timedelta(seconds=0.1))
    for _ in range(10):
        assert not waiting.finished()
        time.sleep(0.03)
        ended = steps(torch.zeros(3, 7, dtype=torch.long), None)
        assert ended.dtype == torch.bool and ended.tolist() == [False] * 3
    slow.post(0, rows_of(0))
    time.sleep(0.15)
    assert waiting.finished()


@pytest.mark.parametrize("replicas", [1, 2])
def test_jobs_one_after_another_do_not_mix(replicas, connect):
    """Not even where the caller seeds torch alike before each, nor do they change what is sampled."""
    torch.distributed.init_process_group("gloo", store=connect(), rank=0, world_size=1)
    try:
        mpu = Mpu(Group(0, 1), Group(0, replicas), Group(0, 1))
        for job in range(3):
            torch.manual_seed(0)
            queue, drawn = join_queue(mpu, 2), torch.rand(1)
            assert (queue.replica, queue.replicas) == (0, replicas)
            for one in [queue, BatchQueue(queue._store, 2, 1, 2)][:replicas]:
                for number in one.take():
                    one.post(number, [{"job": job}])
            assert queue.finished() and [rows for _, rows in queue.collect()] == [[{"job": job}]] * 2
            torch.manual_seed(0)
            assert drawn == torch.rand(1)
    finally:
        torch.distributed.destroy_process_group()


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 9))
def test_what_an_assignment_keeps(count, size, replicas):
    batches = split(list(range(count)), size, replicas)
    sizes = [len(batch) for batch in batches]
    assert [r for batch in batches for r in batch] == list(range(count))
    assert all(1 <= n <= size for n in sizes)
    assert len(batches) >= min(replicas, count)
    assert len(batches) == max(-(-count // size), min(replicas, count)), "no more than are needed"


def test_a_tally_counts_what_was_done_and_what_a_former_run_did():
    former = [{"new_tokens": 3, "correct": True}, {"error": "no"}, {"new_tokens": 2, "correct": False}]
    tally = Tally().plus(former, resumed=True)
    assert tally == Tally(answered=2, failed=1, wrong=1, new_tokens=5, resumed=3)
    tally = tally.plus([{"new_tokens": 4}, {"error": "no"}, {"new_tokens": 1, "correct": False}]).plus([])
    assert tally == Tally(answered=4, failed=2, wrong=2, new_tokens=10, resumed=3)
    summary = tally.summary(from_dict({"model": {"path": str(DEMO)}}), 4, time.perf_counter() - 2)
    assert 2 <= summary.pop("seconds") < 30
    assert summary == {"summary": True, "tp_size": 4, "requests": 0, "answered": 4, "failed": 2, "wrong": 2,
                       "new_tokens": 10, "resumed": 3}


@pytest.mark.parametrize("expected, row, judged", [
    (None, {"answer": "a"}, {"answer": "a"}), ("a", {"error": "no"}, {"error": "no"}),
    ("a", {"answer": "a"}, {"answer": "a", "expected": "a", "correct": True}),
    ("a", {"answer": "A"}, {"answer": "A", "expected": "a", "correct": False}),
    ("", {"answer": ""}, {"answer": "", "expected": "", "correct": True}),
])
def test_an_answer_is_held_against_what_is_expected(expected, row, judged):
    assert _judged(row, parse_request({"id": "1", "prompt": "x", "expected": expected})) == judged


def ahead_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def gone(seconds=60.0):
    until = time.monotonic() + seconds
    while ahead_threads() and time.monotonic() < until:
        time.sleep(0.01)
    return not ahead_threads()


@pytest.mark.parametrize("count", [0, 1, 5])
def test_read_ahead_is_the_same_items(count):
    assert list(read_ahead(iter(range(1, count + 1)))) == list(range(1, count + 1)) and gone()


def test_a_user_who_stops_early_neither_waits_nor_leaves_a_thread():
    go_on, made, ended = threading.Event(), [], []

    def items():
        for n in range(1, 10):
            made.append(n)
            if n == 2:
                ended.append(go_on.wait(60))
            yield n

    reader = read_ahead(items())
    assert next(reader) == 1
    until = time.monotonic() + 60
    while made == [1] and time.monotonic() < until:
        time.sleep(0.01)
    reader.close()
    assert not ended, "it waited for the item that is being made"
    go_on.set()
    assert gone() and made == [1, 2] and ended == [True]


def test_errors_of_the_user_and_of_the_making_leave_no_thread():
    def items():
        yield 1
        yield 2
        raise MemoryError("no room")

    with pytest.raises(KeyError):
        for _ in read_ahead(items()):
            raise KeyError
    seen = []
    with pytest.raises(MemoryError, match="no room"):
        for n in read_ahead(items()):
            seen.append(n)
    assert seen == [1, 2] and gone()


@pytest.fixture(scope="module")
def processor():
    return make_processor(from_dict({"model": {"path": str(DEMO)}, "requests": [{"id": "1", "prompt": "x"}]}), 512)


def small(output=None, **sections):
    """The demo's own processor over six requests, of which one cannot be prepared."""
    requests = [{"id": str(n), "prompt": f"Question {n}?", "expected": None if n % 2 else "?"} for n in range(6)]
    requests[3]["images"] = ["/no/such/picture.png"]
    config = from_dict({"model": {"path": str(DEMO)}, "requests": requests, "batch_size": 2, "output": output,
                        "generation": {"max_new_tokens": 3}, **sections})
    return config, Limits.of(config, 512, GenerationConfig(eos_token_id=0))


def one_token(inputs, clock):
    return Generated(torch.full((len(inputs["input_ids"]), 1), 5))


def test_a_job_in_one_process(processor):
    config, limits = small()
    written = []
    tally = answer(config, processor, limits, one_token, Printed(written.append))
    assert [row["id"] for row in written] == list("012345")
    assert "/no/such/picture.png" in written[3]["error"]
    assert tally == Tally(answered=5, failed=1, wrong=3, new_tokens=5)


def test_a_job_that_was_stopped_does_the_rest(processor, tmp_path):
    config, limits = small(str(tmp_path / "out"))

    def stop(inputs, clock):
        if calls.append(1) or len(calls) == 3:
            raise KeyboardInterrupt
        return one_token(inputs, clock)

    calls: list = []
    stopped = Recorded(config)
    with pytest.raises(KeyboardInterrupt):
        answer(config, processor, limits, stop, stopped)
    stopped_at = (tmp_path / "out").read_text()
    assert stopped_at.count("\n") == 4
    os.close(stopped._file)
    again = Recorded(config)
    tally = answer(config, processor, limits, one_token, again)
    assert tally == Tally(answered=5, failed=1, wrong=3, new_tokens=5, resumed=4)
    assert (tmp_path / "out").read_text().startswith(stopped_at)
    assert answer(config, processor, limits, pytest.fail, Recorded(config)) == Tally(5, 1, 3, 5, resumed=6)


def test_two_replicas_work_and_rank_0_brings_the_rows(processor, connect):
    config, limits = small()
    batches = split(config.requests, 1, 2)
    written = []
    other = threading.Thread(
        target=lambda: _work(batches, BatchQueue(connect(), 6, 1, 2), processor, limits, one_token, None))
    other.start()
    answers, queue = Printed(written.append), BatchQueue(connect(), 6, 0, 2)
    tally = _work(batches, queue, processor, limits, one_token, answers)
    other.join(20)
    assert queue.finished()
    for number, rows in queue.collect():
        answers.add(number, rows)
        tally = tally.plus(rows)
    answers.finish()
    assert [row["id"] for row in written] == list("012345")
    assert tally == Tally(answered=5, failed=1, wrong=3, new_tokens=5)
