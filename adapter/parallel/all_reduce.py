"""Which way a group sums: every way that is right here is tried as the job starts, and the quickest is taken.

Through memory that the ranks of a host share (adapter.parallel.shared_memory), through DeepSpeed's shared-memory op,
or through torch's group, which always can. What is possible and what was measured is one line of the log.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from packaging.version import Version
from torch import Tensor

from adapter.parallel import shared_memory
from adapter.parallel.cpu import affinity, cpu_quota, within_quota
from adapter.parallel.group import TORCH, Group, Route, exchange, torch_all_gather
from adapter.parallel.launchers import Launch
from adapter.parallel.shared_memory import common

SHM_TRIED = Version("0.19")  # DeepSpeed's shared-memory op of releases from here on sums every dtype
TOKEN_BYTES = 4096  # of a sum in a step that makes one token, where the caller does not know
PROMPT_BYTES = 512 << 10  # of one over a prompt with an image
LIMIT_S = 0.2  # after which no round begins
TOKENS = 64  # decode steps of an answer, against its one prompt: how the two sizes are weighed
BUDGET_S, ROUNDS, MOST_CALLS = 0.015, 3, 10  # for one way and size; calls in a round
NOISE = 0.8  # a later way must take less than this share of an earlier one's time


def _deepspeed_all_reduce(x: Tensor, group: Any) -> None:
    dist.inference_all_reduce(x, group=group)


DEEPSPEED = Route("DeepSpeed's shared-memory op", _deepspeed_all_reduce, torch_all_gather, busy_waits=True)
Times = Mapping[str, Sequence[float]]  # route -> microseconds of each size


def choose(world: Group, tp: Group, ranks: Sequence[int], launch: Launch, token_bytes: int,
           limit_s: float) -> tuple[Route, str]:
    """The same route on every rank, and in words what it is, what was measured and why others are not possible.

    Every rank must call it, with groups of one size. ranks: those of tp, by their numbers in the world.
    """
    if tp.size == 1:
        return TORCH, "nothing to sum, one rank has the whole model"
    if get_accelerator().device_name() != "cpu":
        return TORCH, f"{get_accelerator().communication_backend_name()} (ranks on accelerators)"
    routes, refused = list[Route](), dict[str, str]()
    region = shared_memory.join(world, tp.rank, ranks, limit_s)
    if isinstance(region, str):
        refused[shared_memory.NAME] = region
    else:
        routes.append(Route(shared_memory.NAME, region.all_reduce, region.all_gather))
    if (refusal := _deepspeed_refusal_of_any(world, launch, tp.size)) is None:
        routes.append(DEEPSPEED)
    else:
        refused[DEEPSPEED.name] = refusal
    routes.append(TORCH)
    sizes = (token_bytes, PROMPT_BYTES)
    times = measure(world, tp, routes, sizes) if len(routes) > 1 else {}
    route = quickest(routes, times)
    return route, describe(route, sizes, times, refused)


def deepspeed_refusal(launch: Launch, tp_size: int) -> str | None:
    """Why DeepSpeed's shared-memory op cannot or should not sum; None where it may."""
    if getattr(dist.comm.cdb, "shm_comm_op", None) is None:
        return "it needs ninja and a C++ compiler on PATH"
    if Version(deepspeed.__version__) < SHM_TRIED:
        return (f"it is used from DeepSpeed {SHM_TRIED} on and this is {deepspeed.__version__}: 0.16.0's dies of an "
                "illegal instruction in half precision")
    if not launch.one_host or launch.world_size != tp_size:
        return ("it sums over all ranks of the job, whatever the group, and needs them all on one host, in one replica "
                f"(LOCAL_SIZE {launch.local_size or 'not set'}, world {launch.world_size}, tp_size {tp_size})")
    return None


def _deepspeed_refusal_of_any(world: Group, launch: Launch, tp_size: int) -> str | None:
    """Why any rank refuses DeepSpeed's op, or the cores that they all have are too few for it; None: none does.

    Every rank must call it; all get the same answer.
    """
    mine = {"refusal": deepspeed_refusal(launch, tp_size), "cores": sorted(affinity()), "quota": cpu_quota()}
    every = exchange(world, mine)
    return common([facts["refusal"] for facts in every]) or too_few_cores(
        tp_size, [facts["cores"] for facts in every], [facts["quota"] for facts in every])


def too_few_cores(tp_size: int, cores: Sequence[Sequence[int]], quotas: Sequence[float | None]) -> str | None:
    """Why DeepSpeed's op is too slow for ranks of one host that may run on `cores`; None where it is not.

    It busy-waits, so each rank needs a core of its own. cores: the numbers of each rank's; quotas: as cpu_quota's.
    """
    stated = min((quota for quota in quotas if quota is not None), default=None)
    count = within_quota(len(set().union(*cores)), stated)
    if tp_size <= count:
        return None
    return f"it busy-waits, too slow with {tp_size} ranks on {count} core{'s' * (count > 1)}"


def measure(world: Group, tp: Group, routes: Sequence[Route], sizes: Sequence[int]) -> dict[str, list[float]]:
    """Microseconds that each route takes for each size in bytes: the lower quartile, of the slowest rank of the job.
    What else runs on the machine only adds to them, and on a busy one the median of few calls is of disturbed ones.

    Every rank makes the same number of calls: two, and then rounds in which all routes take turns, with as many calls
    as BUDGET_S has room for, until LIMIT_S are over.
    """
    began = time.perf_counter()
    tried = [(replace(tp, route=route), torch.zeros(max(1, size // 4))) for route in routes for size in sizes]
    took = [[_microseconds(*one), _microseconds(*one)] for one in tried]  # the first may connect, or touch new pages
    calls = [min(MOST_CALLS, int(BUDGET_S * 1e6 / ROUNDS / max(us, 1))) for us in _slowest(world, map(min, took))]
    for _ in range(ROUNDS):
        if _slowest(world, [time.perf_counter() - began])[0] > LIMIT_S:
            break
        for one, times, count in zip(tried, took, calls, strict=True):
            times += [_microseconds(*one) for _ in range(count)]
    figures = iter(_slowest(world, (statistics.quantiles(times, n=4, method="inclusive")[0] for times in took)))
    return {route.name: [next(figures) for _ in sizes] for route in routes}


def _slowest(world: Group, mine: Iterable[float]) -> list[float]:
    """Each figure of the rank where it is the largest."""
    every = exchange(world, {"us": [round(us, 3) for us in mine]})
    return [max(figures) for figures in zip(*(facts["us"] for facts in every), strict=True)]


def _microseconds(tp: Group, x: Tensor) -> float:
    began = time.perf_counter()
    tp.all_reduce(x)
    return (time.perf_counter() - began) * 1e6


def quickest(routes: Sequence[Route], times: Times) -> Route:
    """The route that takes the least for a prompt and its answer; an earlier one where the difference may be noise."""
    best = routes[0]
    for route in routes[1:]:
        if _cost(times[route.name]) < NOISE * _cost(times[best.name]):
            best = route
    return best


def _cost(microseconds: Sequence[float]) -> float:
    token, prompt = microseconds
    return TOKENS * token + prompt


def describe(route: Route, sizes: Sequence[int], times: Times, refused: Mapping[str, str]) -> str:
    """One line: the route; each measured one's microseconds; why the others are not possible."""
    parts = [route.name]
    if times:
        named = " and ".join(f"{size / 1000:.0f} KB" if size >= 1000 else f"{size} bytes" for size in sizes)
        parts.append(f"microseconds for {named}: " + ", ".join(
            f"{name} {' and '.join(f'{us:.0f}' for us in figures)}" for name, figures in times.items()))
    parts += [f"not {name}: {why}" for name, why in refused.items()]
    return "; ".join(parts)
