"""`tensor_parallel.vision: auto`, checked: pictures through the encoder in both ways, and the way that its cost
takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from adapter.model.vision_data_parallel import VisionDataParallel, data_parallel_of
from adapter.parallel.group import to_device
from adapter.planning.vision_balance import EXAMPLES, deal


def ways(engine: deepspeed.InferenceEngine) -> dict[str, dict[str, float]]:
    """What is read -> seconds split over the ranks (tensor_s), dealt to them (data_s), and of the two the way that
    `auto` takes (auto_s). Empty unless the engine's encoder is whole on every rank. Every rank must call it."""
    encoder = data_parallel_of(engine.module, engine.plan)
    if encoder is None or encoder.tp.size == 1:
        return {}
    return {what: _both(engine, encoder, grid) for what, grid in EXAMPLES.items() if sum(row[0] for row in grid) > 1}


def _both(engine: deepspeed.InferenceEngine, encoder: VisionDataParallel, rows: list[list[int]]) -> dict[str, float]:
    grid, who = to_device(torch.tensor(rows)), deal(rows, encoder.tp.size)
    dtype = next(engine.module.parameters()).dtype
    patches = to_device(torch.zeros(sum(who.sizes), engine.plan.geometry.picture[0], dtype=dtype))

    def seconds(run: Callable[[], Any]) -> float:
        engine.mpu.world.barrier()
        began = time.perf_counter()
        with torch.inference_mode():
            run()
        get_accelerator().synchronize()
        return round(time.perf_counter() - began, 4)

    split = seconds(lambda: encoder.run(True, patches, grid, {}))
    dealt = seconds(lambda: encoder.by_share(who, patches, grid, {}))
    return {"tensor_s": split, "data_s": dealt, "auto_s": dealt if encoder.cost.deals(who) else split}
