"""Rank 1 has another configuration, or another release, than rank 0: as on two hosts with copies of their own.

    deepspeed --num_accelerators 2 unlike_worker.py {generation, release, tp_size, files} MODEL_DIR

files: it reads MODEL_DIR-other.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from adapter.commands import common


def main(args: argparse.Namespace, results: common.Results) -> int:
    import transformers

    import adapter
    from adapter.config.load import from_dict

    odd = int(os.environ["RANK"]) == 1
    other = "-other" if odd and args.what == "files" else ""
    config = from_dict({
        "model": {"path": f"{args.model}{other}", "dtype": "float32"},
        "tensor_parallel": {"tp_size": 1 if odd and args.what == "tp_size" else 2},
        "generation": {"max_new_tokens": 9 if odd and args.what == "generation" else 8}}, Path("."))
    if odd and args.what == "release":
        transformers.__version__ = "4.49.0"
    adapter.init_inference(config)
    return 0


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--local_rank", type=int)
    p.add_argument("what", choices=["generation", "release", "tp_size", "files"])
    p.add_argument("model", type=Path)
    common.run(main, p)
