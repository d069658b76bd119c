"""A job of two ranks that share a model, whose memory ends: on both at the same step, or on one of them.

    deepspeed --num_accelerators 2 out_of_memory_worker.py {alike, alone} --config FILE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from adapter import engine
from adapter.commands import generate

rank, how = int(os.environ["RANK"]), "alike" if "alike" in sys.argv else "alone"
sys.argv.remove(how)
init_inference = engine.init_inference


def short_of_memory(*args, **kwargs):
    made = init_inference(*args, **kwargs)
    own = made.generate

    def generate(*inputs, **kwargs):
        rows, length = kwargs["input_ids"].shape
        if (rows > 2 or length > 80) and (how == "alike" or rank == 1):
            if how == "alike":
                made.mpu.tp.agreed(1)  # some collective of the batch has been by then
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return own(*inputs, **kwargs)

    made.generate = generate
    return made


engine.init_inference = short_of_memory
generate.start()
