"""One rank that loads models one after another and generates; a JSON line from rank 0 for each.

    deepspeed --num_accelerators N shards_worker.py DTYPE FORMAT=DIRECTORY [FORMAT=DIRECTORY ...]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from checkpoints import cases
from worker import GREEDY, inputs_for

import adapter
from adapter.checkpoint.digest import digest
from adapter.config.load import from_dict

TP = int(os.environ["WORLD_SIZE"])


def main() -> None:
    dtype, *models = (a for a in sys.argv[1:] if not a.startswith("--"))
    for form, directory in (model.split("=", 1) for model in models):
        engine = adapter.init_inference(from_dict({
            "model": {"path": directory, "dtype": dtype}, "tensor_parallel": {"tp_size": TP},
            "weights": {"format": form}}))
        inputs = inputs_for(cases(engine.plan.geometry.sizes["vocab"])["batch"], "cpu")
        with torch.inference_mode():
            logits = engine(**inputs).logits
        tokens = engine.generate(**inputs, **GREEDY)
        load = torch.tensor([engine.load_report.weight_bytes, engine.load_report.bytes_read])
        held, read = engine.mpu.tp.all_gather_last(load, (2,) * TP).view(TP, 2).unbind(1)
        if engine.mpu.tp.rank == 0:
            row = {"model": directory, "format": form, "logits": digest(logits), "tokens": tokens.tolist(),
                   "held": held.tolist(), "read": read.tolist(), "spread": float(logits.std())}
            os.write(1, (json.dumps(row) + "\n").encode())


if __name__ == "__main__":
    main()
