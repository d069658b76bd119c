"""Ranks of one job that are unlike each other, each in one `generate`; a JSON line of every rank.

    deepspeed --num_accelerators 2 unlike_ranks_worker.py MODEL_DIR {hook, compiler, gloo}...

hook: rank 0 logs with a forward hook that changes nothing; afterwards, without it, everything is as before.
compiler: rank 1 has no compiled operators. gloo: the same, and the ranks sum through torch's group, as those of several
hosts do.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from checkpoints import cases

import adapter
from adapter.config.load import from_dict
from adapter.kernels import build
from adapter.parallel import all_reduce

ASKED = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True,
         "output_logits": True}
RANK = int(os.environ["RANK"])


def started(directory: str) -> Any:
    return adapter.init_inference(from_dict({"model": {"path": directory, "dtype": "float32"},
                                             "tensor_parallel": {"tp_size": 2}}))


class Logged(logging.Handler):
    """What the adapter logged while it decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("adapter").addHandler(self)
        logging.getLogger("adapter").setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def taken(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


def main() -> None:
    directory, *what = (a for a in sys.argv[1:] if not a.startswith("--"))
    inputs, logged = cases()["batch"], Logged()
    plain = transformers.Qwen2VLForConditionalGeneration.from_pretrained(directory, torch_dtype=torch.float32).eval()
    expected = plain.generate(**inputs, **ASKED)
    facts: dict[str, Any] = {"rank": RANK}

    def compare(name: str, engine: Any) -> None:
        logged.taken()
        got = engine.generate(**inputs, **ASKED)
        worst = max(float((a - b).abs().max()) for a, b in zip(got.logits, expected.logits, strict=True))
        facts[name] = {"equal": torch.equal(got.sequences, expected.sequences), "worst": worst,
                       "logged": logged.taken()}

    engine, seen = started(directory), []
    if "hook" in what:
        hook = None
        if RANK == 0:
            layers = getattr(engine.module.model, "language_model", engine.module.model).layers
            hook = layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
        compare("hook", engine)
        facts["hook"]["calls"] = len(seen)
        if hook:
            hook.remove()
        compare("unhooked", engine)
    if RANK == 1:
        build.unavailable = lambda: "no compiler here"
    if "compiler" in what:
        compare("compiler", started(directory))
    if "gloo" in what:
        all_reduce.deepspeed_refusal = lambda *_: "not in this test"
        engine = started(directory)
        compare("gloo", engine)
        facts["gloo"]["route"] = engine.mpu.tp.route.name
    os.write(1, (json.dumps(facts) + "\n").encode())
    engine.mpu.world.barrier()


if __name__ == "__main__":
    main()
