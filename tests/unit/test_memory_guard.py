"""Batches for which there is no memory: halves, failed rows, and what ranks agree on before they try again."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
from launching import ROOT
from torch.distributed import HashStore
from transformers import GenerationConfig

from adapter.config.load import from_dict, parse_request
from adapter.parallel.group import Group
from adapter.parallel.progress import CollectiveState
from adapter.requests import out_of_memory, processing
from adapter.requests.batching import Generated, Limits
from adapter.requests.out_of_memory import MemoryGuard, OutOfMemory, is_out_of_memory
from adapter.requests.results import Printed
from adapter.requests.runner import _prepare, answer, make_processor
from policies.errors import UserError

DEMO = ROOT / "launch" / "demo" / "checkpoint"
NONE_LEFT = (MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
             RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"))


@pytest.fixture(scope="module")
def processor():
    return make_processor(from_dict({"model": {"path": str(DEMO)}, "requests": [{"id": "1", "prompt": "x"}]}), 512)


@pytest.mark.parametrize("error", NONE_LEFT, ids=lambda error: type(error).__name__)
def test_memory_is_distinguished_from_other_errors(error):
    assert is_out_of_memory(error)
    assert not any(map(is_out_of_memory, (RuntimeError("shape"), ValueError("can't allocate memory"))))


@pytest.mark.parametrize("error, fits, failed", [
    (NONE_LEFT[0], 8, []), (NONE_LEFT[0], 1, []), *((error, 3, []) for error in NONE_LEFT),
    (NONE_LEFT[1], 0, list("01234567")),
])
def test_a_batch_is_halved_until_it_fits(processor, monkeypatch, error, fits, failed):
    monkeypatch.setattr(out_of_memory.gc, "collect", lambda: 0)  # a second each, where much is loaded
    requests = [{"id": str(n), "prompt": f"Question {n}?"} for n in range(8)]
    config = from_dict({"model": {"path": str(DEMO)}, "requests": requests, "batch_size": 8})
    sizes, written = [], []

    def run(inputs, clock):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > fits:
            raise error
        return Generated(torch.full((sizes[-1], 1), 5))

    limits = Limits.of(config, 512, GenerationConfig(eos_token_id=0))
    tally = answer(config, processor, limits, run, Printed(written.append))
    assert [row["id"] for row in written] == list("01234567"), "each once, in order"
    assert [row["id"] for row in written if "error" in row] == failed and tally.failed == len(failed)
    assert all("out of memory" in row["error"] and "max_new_tokens" in row["error"] for row in written if failed)
    assert max(size for size in sizes if size <= fits or not fits) and sizes[0] == 8


def test_one_request_that_does_not_fit_fails_alone(processor):
    requests = [{"id": str(n), "prompt": "long " * 60 * (n == 2) + "Question?"} for n in range(5)]
    config = from_dict({"model": {"path": str(DEMO)}, "requests": requests, "batch_size": 5})
    written = []

    def run(inputs, clock):
        if inputs["input_ids"].shape[1] > 60:
            raise MemoryError
        return Generated(torch.full((len(inputs["input_ids"]), 1), 5))

    answer(config, processor, Limits.of(config, 512, GenerationConfig(eos_token_id=0)), run, Printed(written.append))
    assert ["error" in row for row in written] == [False, False, True, False, False]


def test_another_error_ends_the_job(processor):
    config = from_dict({"model": {"path": str(DEMO)}, "requests": [{"id": "1", "prompt": "x"}]})

    def run(inputs, clock):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        answer(config, processor, Limits.of(config, 512, GenerationConfig(eos_token_id=0)), run, Printed(print))


@dataclass
class Counted:
    """Stands for a rank's Progress."""

    entered: int = 0

    def state(self):
        return CollectiveState(self.entered, False, 0, 0)


def two_ranks(*works):
    """What each of two ranks meets: None or the error."""
    store, met = HashStore(), [None, None]

    def rank(number):
        progress = Counted()
        guard = MemoryGuard(Group(number, 2, progress=progress), store)
        for work in works[number]:
            met[number] = None
            try:
                guard.run(lambda work=work: work(progress))
            except Exception as error:
                met[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return met


def out_at(collective):
    def work(progress):
        progress.entered += collective
        raise MemoryError("no room")

    return work


def fine(progress):
    progress.entered += 9


def test_ranks_that_run_out_at_the_same_step_go_on():
    assert all(isinstance(error, OutOfMemory) for error in two_ranks([out_at(3)], [out_at(3)]))
    assert two_ranks([out_at(3), fine], [out_at(3), fine]) == [None, None]
    assert all(isinstance(e, OutOfMemory) for e in two_ranks([fine, out_at(0)], [fine, out_at(0)]))


@pytest.mark.parametrize("other", [fine, out_at(4)])
def test_a_rank_that_runs_out_alone_ends_with_what_to_do(monkeypatch, other):
    monkeypatch.setattr(out_of_memory, "WAIT", timedelta(seconds=1))
    error = two_ranks([other], [out_at(3)])[1]
    assert isinstance(error, UserError)
    assert "out of memory on rank 1" in str(error) and "no room" in str(error) and "lower batch_size" in str(error)


def test_a_failed_request_keeps_no_pixels(processor, monkeypatch):
    held = []

    def render(*_):
        pixels = torch.zeros(100)
        held.append(weakref.ref(pixels))
        raise MemoryError

    monkeypatch.setattr(processing.RequestProcessor, "_render", render)
    error = _prepare(processor, parse_request({"id": "r", "prompt": "x"}))
    gc.collect()
    assert "more memory than there is" in error.reason and held[0]() is None
