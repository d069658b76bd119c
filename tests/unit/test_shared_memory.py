"""The operators that sum through shared memory: ranks are threads here, each with a mapping of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import ExitStack, closing

import pytest
import torch
from torch.library import opcheck

from adapter.kernels import build
from adapter.parallel import shared_memory
from adapter.parallel.shared_memory import DTYPES, Region, UnlikeSteps, common

OPS = torch.ops.qwenvl_tp


@pytest.fixture(scope="module", autouse=True)
def operators() -> None:
    assert build.unavailable() is None


def opened(pids: list[int], limit_s: float = 60) -> list[Region]:
    """A region as each of its ranks has it; they are called 10, 11, ..."""
    fd, _ = shared_memory._create(OPS.region_bytes(len(pids)))
    names = [10 + i for i in range(len(pids))]
    try:
        return [Region(OPS.region_open(fd, index, names, pids, limit_s)) for index in range(len(pids))]
    finally:
        os.close(fd)


def in_threads(regions, do):
    """do(region, index) of every rank at once; what each returned or raised."""
    results = [None] * len(regions)

    def work(index):
        try:
            results[index] = do(regions[index], index)
        except (RuntimeError, ValueError) as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(regions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return results


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_once_to_nearest_even(dtype):
    """1 + u/2 + u/2 is 1 where each addition is rounded, 1 + u where float32 is, once; ties go to even."""
    regions, u = opened([os.getpid()] * 3), torch.finfo(dtype).eps
    small = torch.tensor([u / 2, u / 2, 3 * u / 2, 0.0], dtype=dtype)
    parts = [torch.ones(4, dtype=dtype), small, torch.tensor([u / 2, 0.0, 0.0, 0.0], dtype=dtype)]
    sums = in_threads(regions, lambda region, index: region.all_reduce(parts[index], None))
    assert sums == [None] * 3
    first = 1.0 if dtype == torch.float32 else 1 + u
    for part in parts:
        assert part.tolist() == [first, 1.0, 1 + 2 * u, 1.0]


def test_infinities_and_nan_come_through():
    regions = opened([os.getpid()] * 2)
    for dtype in DTYPES:
        odd = [torch.inf, torch.nan, torch.finfo(dtype).max, -torch.inf]
        parts = [torch.tensor(odd, dtype=dtype) for _ in range(2)]
        in_threads(regions, lambda region, index, parts=parts: region.all_reduce(parts[index], None))
        assert parts[0][[0, 2]].tolist() == [torch.inf] * 2 and parts[0][3] == -torch.inf and parts[0][1].isnan()


def test_what_is_refused():
    (region,) = opened([os.getpid()])
    with pytest.raises(RuntimeError, match="contiguous"):
        OPS.all_reduce_(torch.ones(4, 4).t(), region.handle)
    for dtype in (torch.int64, torch.float64, torch.bool):
        with pytest.raises(RuntimeError, match="float32, bfloat16 and float16"):
            OPS.all_reduce_(torch.ones(4, dtype=dtype), region.handle)
    with pytest.raises(RuntimeError, match="all_gather_ of 1 ranks: 3 values"):
        OPS.all_gather_(torch.ones(3), torch.ones(4), region.handle)
    for handle in (-1, 1023, 2**40):
        with pytest.raises(RuntimeError, match=f"handle {handle}"):
            OPS.all_reduce_(torch.ones(4), handle)
    with ExitStack() as stack, pytest.raises(RuntimeError, match=r"not of \d+ bytes"):
        file = stack.enter_context(closing(os.fdopen(os.memfd_create("short"), "rb")))
        OPS.region_open(file.fileno(), 0, [0, 1], [1, 2], 1.0)


def test_a_dead_rank_is_named():
    """Its process has ended, and its parent has not asked how: a zombie is dead too."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    regions = opened([os.getpid(), child.pid])
    with pytest.raises(RuntimeError, match=rf"rank 11 \(process {child.pid}\) died"):
        regions[0].all_reduce(torch.ones(4), None)
    child.wait()
    with pytest.raises(RuntimeError, match="cannot be used after an error"):
        regions[0].all_reduce(torch.ones(4), None)


def test_a_rank_that_does_not_come_is_named():
    regions = opened([os.getpid()] * 2, limit_s=0.2)
    with pytest.raises(RuntimeError, match=rf"rank 10 \(process {os.getpid()}\) has not come"):
        regions[1].all_reduce(torch.ones(4), None)


def test_ranks_that_do_not_share_the_same_message_are_reported():
    for other in (torch.ones(5), torch.ones(4, dtype=torch.bfloat16), torch.ones(300000)):
        regions = opened([os.getpid()] * 2)
        found = in_threads(regions, lambda region, index, other=other: region.all_reduce(
            other if index else torch.ones(4), None))
        assert all(isinstance(error, UnlikeSteps) and "do not run the same steps" in str(error) for error in found)
        assert all("desync_check=1" in str(error) and "\n" not in str(error) for error in found), found


def test_memory_goes_with_the_last_holder():
    def maps() -> int:
        with open("/proc/self/maps", encoding="utf-8") as file:
            return sum("memfd:all-reduce" in line for line in file)

    before, regions = maps(), opened([os.getpid()] * 2)
    assert maps() == before + 2
    del regions
    assert maps() == before
    assert not [fd for fd in os.listdir("/proc/self/fd") if "all-reduce" in _target(fd)]


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # that of the listing itself
        return ""


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiles_as_one_graph(backend):
    """A graph keeps the sum where it is: values before it are not those after it."""
    (region,) = opened([os.getpid()])
    handle = region.handle
    marks = torch.zeros(2, 8)

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * 2
        OPS.all_reduce_(y, handle)
        out = y.new_empty(y.numel())
        OPS.all_gather_(out, y.reshape(-1), handle)
        return y + 1, out

    with torch.inference_mode():
        compiled = torch.compile(step, backend=backend, fullgraph=True)
        for x in (marks + 1, marks + 3):
            y, out = compiled(x)
            assert torch.equal(y, x * 2 + 1) and torch.equal(out, (x * 2).reshape(-1))


def test_schemas_and_fakes_say_what_the_operators_do():
    (region,) = opened([os.getpid()])
    opcheck(OPS.all_reduce_.default, (torch.ones(4, 4), region.handle))
    opcheck(OPS.all_gather_.default, (torch.zeros(16), torch.ones(4, 4), region.handle))


@pytest.mark.parametrize("refusals, reported", [
    ([None, None], None), (["no", "no"], "no"), ([None, "no"], "rank 1: no"), (["a", "b"], "rank 0: a; rank 1: b"),
])
def test_what_ranks_refuse_in_words(refusals, reported):
    assert common(refusals) == reported
