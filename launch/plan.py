#!/usr/bin/env python3
"""What each rank would own, before anything is loaded: heads, slices, bytes, collectives and every violated constraint.

    python launch/plan.py --config configs/qwen2_vl_7b_tp4.yaml [--json] [key=value ...]

Reads config.json and the headers of the safetensors files. Exit 2 where the plan has problems.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapter import command


def main(args: argparse.Namespace, results: command.Results) -> int:
    from adapter.config import load_config
    from adapter.plan import make_plan, report

    config = load_config(args.config, args.overrides)
    plan, checkpoint, problems = make_plan(config.model.path, config.tensor_parallel.tp_size, config.model.dtype)
    facts = report(plan, problems)
    if checkpoint is None:
        print(f"note: {config.model.path} holds no safetensors file; planned from config.json alone", file=sys.stderr)
    if args.json:
        results.write(facts)
    else:
        results.text(_table(facts))
    return command.BAD_INPUT if problems else command.DONE


def _table(facts: dict[str, Any]) -> str:
    """The same facts for people; tensors by their row of the policy, slices of rank 0 and the last rank."""
    def span(pair: list[int]) -> str:
        return f"{pair[0]}-{pair[1] - 1}" if pair[1] > pair[0] else "none"

    lines = [f"{facts['model_type']}, tp_size {facts['tp_size']}, {facts['dtype']}"]
    lines += [f"problem: {p}" for p in facts["problems"]]
    lines += [f"tp sizes that work: {facts['valid_tp_sizes']}"]
    lines += [f"rank {r['rank']}: query heads {span(r['q_heads'])}, KV heads {span(r['kv_heads'])}, vision heads "
              f"{span(r['vision_heads'])}, weights {r['weight_bytes'] / 1e9:.3f} GB, KV cache "
              f"{r['kv_bytes_per_token']} bytes a token" for r in facts["ranks"]]
    reduce, c = facts["collectives"]["per_layer"], facts["collectives"]
    lines += [f"all-reduces per layer: {reduce}; a token: {c['per_token']} collectives, {c['per_token_bytes']} bytes"]
    shown = [t for t in facts["tensors"] if not any(
        t["name"].startswith(f"{stack}.") and not t["name"].startswith(f"{stack}.0.") for stack in reduce)]
    lines += [f"  {t['name']} {t['shape']} {t['rule']}" + (f" dim {t['dim']}: {t['slices'][0]} .. {t['slices'][-1]}"
              if t["dim"] is not None else "") for t in shown]
    return "\n".join(lines)


if __name__ == "__main__":
    arguments = command.parser(__doc__)
    arguments.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    command.run(main, arguments)
