"""One rank that loads whole models, shards them by the three lines, and measures what it gets back. JSON on stdout.

    deepspeed --num_accelerators N given_back_worker.py SMALL_DIR BIG_DIR
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from torch import nn

import adapter

RANKS = int(os.environ["WORLD_SIZE"])
CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "kept": lambda model: deepspeed.init_inference(model, **adapter.deepspeed_kwargs(model, tp_size=RANKS)),
    "adapters": lambda model: adapter.init_inference(model=model, tensor_parallel={"tp_size": RANKS}),
}


def anonymous() -> int:
    """Bytes of memory that is this process's own, in no file."""
    line = next(li for li in Path("/proc/self/smaps_rollup").read_text().splitlines() if li.startswith("Anonymous:"))
    return int(line.split()[1]) << 10


def mapped(directory: str) -> list[str]:
    """The checkpoint's files this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({Path(line.split()[-1]).name for line in lines if f"{directory}/" in line})


def is_mapped(size: int) -> bool:
    """Whether malloc takes a block of this size from the system by itself: glibc marks it in the word before it."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    block = libc.malloc(size)
    found = bool(ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & 2)
    libc.free(block)
    return found


def touch(model: nn.Module) -> None:
    """Read every weight, as the first forward would: what is mapped is in memory then."""
    for parameter in model.parameters():
        parameter.detach().view(-1)[::512].sum()


def measure(directory: str, call: str, dtype: torch.dtype) -> dict[str, Any]:
    gc.collect()  # the engine before
    before = anonymous()
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(directory, torch_dtype=dtype)
    touch(model)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    loaded, files = anonymous(), mapped(directory)
    peak, done = [loaded], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    engine = CALLS[call](model)
    done.set()
    thread.join()
    gc.collect()
    return {
        "call": call, "dtype": str(dtype), "before": before, "whole": sum(sizes), "largest": max(sizes),
        "shard": sum(p.numel() * p.element_size() for p in engine.module.parameters()),
        "loaded": loaded, "peak": peak[0], "after": anonymous(), "mapped": files, "still_mapped": mapped(directory),
        "malloc_as_before": is_mapped(64 << 20),  # above 32 MB, the largest limit that glibc sets by itself
    }


def main() -> None:
    small, big = [a for a in sys.argv[1:] if not a.startswith("--")]
    for call in CALLS:  # libraries, groups and ops are in before anything is measured
        measure(small, call, torch.float32)
    for call, dtype in (("kept", torch.float32), ("adapters", torch.bfloat16)):
        row = measure(big, call, dtype) | {"rank": int(os.environ["RANK"])}
        os.write(1, (json.dumps(row) + "\n").encode())


if __name__ == "__main__":
    main()
