"""One rank that reads a model's adapters wrongly in one way after another, and lets verify look; a JSON line per way.

    deepspeed --num_accelerators N lora_fault_worker.py CONFIG
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import adapter.engine
from adapter.checkpoint.lora import Adapter, MergedCheckpoint
from adapter.config.load import load_config
from adapter.planning.load import checked_plan
from adapter.requests.runner import make_processor
from adapter.verify.verifier import Verifier

RANK, TP = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
checkpoint_source = adapter.engine.checkpoint_source


def one_rank_only(found: Adapter) -> Adapter:
    return replace(found, updates=found.updates if RANK == 0 else {})


def wrong_scale(found: Adapter) -> Adapter:
    return replace(found, updates={n: replace(u, scale=u.scale * 2) for n, u in found.updates.items()})


FAULTS: dict[str, Callable[[Adapter], Adapter]] = {
    "": lambda found: found, "one rank only": one_rank_only, "wrong scale": wrong_scale}


def main() -> None:
    file = next(a for a in sys.argv[1:] if not a.startswith("--local"))
    config = load_config(file, [f"tensor_parallel.tp_size={TP}", "tensor_parallel.self_test=false"])
    plan, checkpoint = checked_plan(config.model.path, TP, config.model.dtype, adapters=config.model.adapters)
    processor = make_processor(config, plan.geometry.context) if RANK == 0 else None
    for name, fault in FAULTS.items():
        def faulty(files: MergedCheckpoint, rank: int, fault: Callable[[Adapter], Adapter] = fault) -> Any:
            return checkpoint_source(replace(files, adapters=tuple(map(fault, files.adapters))), rank)

        adapter.engine.checkpoint_source, rows = faulty, list[dict[str, Any]]()
        engine = adapter.engine.init_inference(config)
        passed = Verifier(config, engine, engine.mpu.tp, checkpoint, processor, rows.append).run()
        if processor:
            row = {"fault": name, "passed": passed, "case": rows[0], "summary": rows[-1]}
            os.write(1, (json.dumps(row) + "\n").encode())


if __name__ == "__main__":
    main()
