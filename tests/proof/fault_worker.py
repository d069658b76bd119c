"""One rank that plants faults one after another and lets verify and the self-test look; a JSON line per fault.

    deepspeed --num_accelerators N fault_worker.py CONFIG DTYPE [FAULT ...]      "": a sound engine
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from planted import FAULTS, Fault
from planted_families import FAMILY_FAULTS
from planted_quantised import QUANTISED_FAULTS

import adapter.engine
from adapter.config.load import load_config
from adapter.planning.load import checked_plan
from adapter.requests.runner import make_processor
from adapter.verify.verifier import Verifier
from policies.errors import CheckFailed

ROOT, TP = Path(__file__).resolve().parents[2], int(os.environ["WORLD_SIZE"])
REQUEST = "requests=[{id: one, prompt: 'What colour is the shape?', images: [%s]}]"
SOUND = Fault(lambda *_: None, None, at_start=True)
EVERY = FAULTS | {name: fault for faults in FAMILY_FAULTS.values() for name, fault in faults.items()}
EVERY |= dict(QUANTISED_FAULTS.values())
inject = adapter.engine.inject


def planted_inject(fault: Fault) -> Any:
    def run(model: torch.nn.Module, plan: Any, tp: Any, *more: Any) -> None:
        inject(model, plan, tp, *more)
        modules = {plan.policy.published(name): module for name, module in model.named_modules()}
        fault.plant(modules, plan, tp)
    return run


def main() -> None:
    file, dtype, *names = (a for a in sys.argv[1:] if not a.startswith("--local"))
    pictures = sorted((ROOT / "launch" / "demo" / "pictures").glob("*colour*"))
    base = [f"tensor_parallel.tp_size={TP}", "generation.max_new_tokens=2", f"model.dtype={dtype}"]
    processor = None
    for name in names:
        fault, rows = EVERY.get(name, SOUND), list[dict[str, Any]]()
        asked = REQUEST % ", ".join(map(str, pictures[:fault.pictures]))
        tested = load_config(file, [*base, f"tensor_parallel.vision={fault.vision}", asked])
        config = load_config(file, [*base, f"tensor_parallel.vision={fault.vision}", asked,
                                    "tensor_parallel.self_test=false"])
        plan, checkpoint = checked_plan(config.model.path, TP, dtype, fault.vision)
        if os.environ["RANK"] == "0":
            processor = processor or make_processor(config, plan.geometry.context)
        adapter.engine.inject = planted_inject(fault)
        started = "held"
        if fault.at_start:
            try:
                adapter.engine.init_inference(tested)
            except CheckFailed as error:
                started = str(error)
        engine = adapter.engine.init_inference(config)
        passed = Verifier(config, engine, engine.mpu.tp, checkpoint, processor, rows.append).run()
        getattr(engine.module, "undo", lambda: None)()
        if processor:
            row = {"fault": name, "passed": passed, "at_start": started, "case": rows[0], "summary": rows[-1]}
            os.write(1, (json.dumps(row) + "\n").encode())


if __name__ == "__main__":
    main()
