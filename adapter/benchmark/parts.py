"""What is timed by itself: the all-reduces, images in both modes of the encoder, and each operator (`--profile`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.profiler import ProfilerActivity, profile

from adapter.model.vision_data_parallel import VisionDataParallel, data_parallel_of
from adapter.parallel.group import to_device
from adapter.planning.vision_balance import EXAMPLES, assign

CALLS = 20  # of an all-reduce, of which the median counts
STEPS = 8  # decode steps over which an operator's seconds are averaged
MOST = 10  # operators that are reported by name


def seconds(engine: deepspeed.InferenceEngine, run: Callable[[], Any]) -> float:
    """Time run() on this rank; all ranks begin together."""
    engine.mpu.world.barrier()
    began = time.perf_counter()
    with torch.inference_mode():
        run()
    get_accelerator().synchronize()
    return time.perf_counter() - began


def collective_us(engine: deepspeed.InferenceEngine, prompt_tokens: int) -> dict[str, dict[str, float]]:
    """Microseconds of the all-reduce of a decode step and of that of the prompt. Empty over one rank."""
    tp, dtype, found = engine.mpu.tp, next(engine.module.parameters()).dtype, {}
    if tp.size == 1:
        return {}
    for name, rows in (("all_reduce_decode", 1), ("all_reduce_prefill", prompt_tokens)):
        x = to_device(torch.zeros(rows, engine.plan.geometry.sizes["hidden"], dtype=dtype))
        found[name] = round(1e6 * median(seconds(engine, partial(tp.all_reduce, x)) for _ in range(CALLS)), 2)
    return {"collective_us": found}


def both_modes(engine: deepspeed.InferenceEngine) -> dict[str, dict[str, dict[str, float]]]:
    """vision_s: images or video -> seconds with the encoder split over the ranks (tensor_s), with whole frames assigned
    to them (data_s), and those of the two that `tensor_parallel.vision: auto` chooses (auto_s). Empty unless every rank
    holds the whole encoder. Every rank must call it."""
    encoder = data_parallel_of(engine.module, engine.plan)
    if encoder is None or encoder.tp.size == 1:
        return {}
    several = {what: grid for what, grid in EXAMPLES.items() if sum(row[0] for row in grid) > 1}
    return {"vision_s": {what: _in_both(engine, encoder, grid) for what, grid in several.items()}}


def _in_both(engine: deepspeed.InferenceEngine, encoder: VisionDataParallel, rows: list[list[int]]) -> dict[str, float]:
    grid, assignment = to_device(torch.tensor(rows)), assign(rows, encoder.tp.size)
    dtype = next(engine.module.parameters()).dtype
    patches = to_device(torch.zeros(sum(assignment.sizes), engine.plan.geometry.patch_values, dtype=dtype))
    tensor_s = round(seconds(engine, lambda: encoder.run(True, patches, grid, {})), 4)
    data_s = round(seconds(engine, lambda: encoder.by_share(assignment, patches, grid, {})), 4)
    return {"tensor_s": tensor_s, "data_s": data_s,
            "auto_s": data_s if encoder.cost.prefers_data(assignment) else tensor_s}


def operators(run: Callable[[int], object]) -> dict[str, dict[str, float]]:
    """CPU seconds of each operator by itself until the first token and in a decode step, the largest first.

    run(n) answers a request with n new tokens. Two answers whose lengths differ by STEPS separate the prompt's part
    from a step's.
    """
    short, long = _profiled(run, 2), _profiled(run, 2 + STEPS)
    step = {name: max(0.0, took - short.get(name, 0.0)) / STEPS for name, took in long.items()}
    first = {name: max(0.0, took - step.get(name, 0.0)) for name, took in short.items()}
    return {"first_token_s": _largest(first), "step_s": _largest(step)}


def _profiled(run: Callable[[int], object], new: int) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run(new)
    return {event.key: event.self_cpu_time_total / 1e6 for event in found.key_averages()}


def _largest(seconds: dict[str, float]) -> dict[str, float]:
    names = sorted(seconds, key=lambda name: -seconds[name])
    rest = sum(seconds[name] for name in names[MOST:])
    return {**{name: round(seconds[name], 5) for name in names[:MOST]}, "all others": round(rest, 5)}
