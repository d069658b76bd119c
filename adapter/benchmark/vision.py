"""`tensor_parallel.vision: auto`, checked: images through the encoder in both modes, and the mode that its cost
chooses."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from adapter.model.vision_data_parallel import VisionDataParallel, data_parallel_of
from adapter.parallel.group import to_device
from adapter.planning.vision_balance import EXAMPLES, assign


def both_modes(engine: deepspeed.InferenceEngine) -> dict[str, dict[str, float]]:
    """Images or video -> seconds with the encoder split over the ranks (tensor_s), with whole frames assigned to them
    (data_s), and those of the two that `auto` chooses (auto_s). Empty unless every rank holds the whole encoder. Every
    rank must call it."""
    encoder = data_parallel_of(engine.module, engine.plan)
    if encoder is None or encoder.tp.size == 1:
        return {}
    return {what: _timed(engine, encoder, grid) for what, grid in EXAMPLES.items() if sum(row[0] for row in grid) > 1}


def _timed(engine: deepspeed.InferenceEngine, encoder: VisionDataParallel, rows: list[list[int]]) -> dict[str, float]:
    grid, assignment = to_device(torch.tensor(rows)), assign(rows, encoder.tp.size)
    dtype = next(engine.module.parameters()).dtype
    patches = to_device(torch.zeros(sum(assignment.sizes), engine.plan.geometry.patch_values, dtype=dtype))

    def seconds(run: Callable[[], Any]) -> float:
        engine.mpu.world.barrier()
        began = time.perf_counter()
        with torch.inference_mode():
            run()
        get_accelerator().synchronize()
        return round(time.perf_counter() - began, 4)

    tensor_s = seconds(lambda: encoder.run(True, patches, grid, {}))
    data_s = seconds(lambda: encoder.by_share(assignment, patches, grid, {}))
    auto_s = data_s if encoder.cost.prefers_data(assignment) else tensor_s
    return {"tensor_s": tensor_s, "data_s": data_s, "auto_s": auto_s}
