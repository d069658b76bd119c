"""One rank that measures its own memory while it loads a shard: PSS before, highest during, after. JSON on stdout.

    deepspeed --num_accelerators N memory_worker.py MODEL_DIR
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from adapter.model.inject import checkpoint_source, inject
from adapter.model.meta_init import build_on_meta
from adapter.parallel import parallel_state
from adapter.planning.load import checked_plan
from adapter.requests.batching import proportional_set_size


def main() -> None:
    directory = Path(next(a for a in sys.argv[1:] if not a.startswith("--")))
    plan, checkpoint = checked_plan(directory, int(os.environ["WORLD_SIZE"]), "bfloat16")
    mpu = parallel_state.start(plan.tp_size)
    parallel_state.dist.barrier()  # everyone's libraries are in, so that shared pages are shared
    before, peak, done = proportional_set_size(), [0], threading.Event()

    def watch() -> None:
        finished = False
        while not finished:  # one look after the last weight: a short load may end between two
            finished = done.wait(0.005)
            peak[0] = max(peak[0], proportional_set_size())

    thread = threading.Thread(target=watch)
    thread.start()
    model = build_on_meta(directory, plan.policy, torch.bfloat16, "sdpa")
    inject(model, plan, mpu.tp, checkpoint_source(checkpoint, mpu.tp.rank), torch.bfloat16)
    done.set()
    thread.join()
    parallel_state.dist.barrier()
    row = {"rank": mpu.tp.rank, "shard": plan.weight_bytes(mpu.tp.rank), "before": before,
           "peak": peak[0], "after": proportional_set_size(), "read": checkpoint.bytes_read}
    os.write(1, (json.dumps(row) + "\n").encode())  # one write: lines of several ranks do not mix
    parallel_state.dist.barrier()


if __name__ == "__main__":
    main()
