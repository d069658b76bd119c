#!/usr/bin/env python3
"""Prove the shards: the requests of a config over tp_size ranks against one process on the same checkpoint.

    deepspeed --num_accelerators 4 launch/verify.py --config C [--dtype bfloat16] [--report FILE.html] [key=value ...]

Runs in float32 unless --dtype says otherwise. stdout: a JSON line per request (and one for a padded batch), then a
summary. Exit 0: everything held; 1: something did not, named in `problems`; 2: bad input, a failed request included.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapter import command


def main(args: argparse.Namespace, results: command.Results) -> int:
    from adapter.config import load_config
    from adapter.plan import checked_plan

    config = load_config(args.config, [*args.overrides, f"model.dtype={args.dtype}"])
    plan, checkpoint = checked_plan(config.model.path, config.tensor_parallel.tp_size, config.model.dtype)
    first = command.environment_rank("RANK") == 0
    if args.report and first:
        from adapter.report import require_matplotlib

        require_matplotlib()
    from adapter.engine import init_inference
    from adapter.generation import make_processor
    from adapter.verify import Verifier
    from adapter.watch import watching

    processor = make_processor(config, plan.geometry.context) if first else None
    engine = init_inference(config)
    tp, rows = engine.mpu.tp, list[dict[str, Any]]()

    def write(row: dict[str, Any]) -> None:
        results.write(row)
        rows.append(row)

    with watching(tp):
        passed = Verifier(config, engine, tp, checkpoint, processor, write).run()
    if first and args.report:
        from adapter.report import render

        Path(args.report).write_text(render(config, rows[:-1], rows[-1]), encoding="utf-8")
        print(f"report: {args.report}", file=sys.stderr)
    failed = any("error" in row for row in rows)
    return command.BAD_INPUT if failed else command.DONE if passed else command.CHECK_FAILED


if __name__ == "__main__":
    arguments = command.parser(__doc__)
    arguments.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"],
                           help="of weights and activations over the ranks; one process computes in float32")
    arguments.add_argument("--report", metavar="FILE", help="write an HTML report as well")
    command.run(main, arguments)
