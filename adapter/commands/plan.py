"""Print what each rank would own, before anything is loaded.

    qwenvl-tp plan --config configs/qwen2_vl_7b_tp4.yaml [--tensors | --json] [key=value ...]
    python launch/plan.py --config C ...    from a checkout

Heads, bytes, collectives, slices (--tensors) and every violated constraint, from config.json and the headers of the
safetensors files. Problems go to stderr, and exit 2. With --hardware configs/hardware/X.yaml it also predicts first
token, tokens/s and memory on that machine.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from dataclasses import replace
from typing import Any, NoReturn

from adapter.checkpoint.lora import MergedCheckpoint
from adapter.commands import common
from adapter.config.hub import described, shown
from adapter.planning.load import make_plan, note_of_defaults, note_of_form, require_sound, stated
from adapter.planning.plan import DTYPE_BYTES, Plan, sizes_in_words
from adapter.planning.vision_balance import EXAMPLES, FLOPS_PER_BYTE, assign, cost
from policies.rules import Experts, Replicated


def main(args: argparse.Namespace, results: common.Results) -> int:
    from adapter.commands.forecast import forecast
    from adapter.config.load import load_config

    config = load_config(args.config, args.overrides, download=False)
    common.clean_up_on_signals()
    with described(config.model.path, config.model.revision) as directory:
        plan, checkpoint, problems = make_plan(directory, **stated(config))
        name = shown(directory)
    facts = report(plan, problems)
    if isinstance(checkpoint, MergedCheckpoint):
        facts["adapters"] = [adapter.facts for adapter in checkpoint.adapters]
    if checkpoint is None:
        print(f"note: {config.model.path} holds no safetensors file; planned from config.json alone", file=sys.stderr)
    for note in filter(None, (note_of_defaults(plan, name), note_of_form(plan, checkpoint))):
        print(note, file=sys.stderr)
    foreseen = None if problems else forecast(plan, args)
    if args.json:
        results.write(facts | ({"prediction": foreseen[0]} if foreseen else {}))
    elif facts["ranks"]:
        results.text(_table(facts, args.tensors) + (f"\n\n{foreseen[1]}" if foreseen else ""))
    require_sound(plan, checkpoint, problems, name)
    return common.DONE


def report(plan: Plan, problems: list[str]) -> dict[str, Any]:
    """The plan as plain data, as the command prints it."""
    known = not plan.policy.problems(plan.geometry, plan.tp_size)
    ranks = range(plan.tp_size) if known else range(0)
    return {
        "model_type": plan.policy.model_type,
        "tp_size": plan.tp_size,
        "dtype": plan.dtype,
        "format": plan.form.name,
        "valid_tp_sizes": plan.sizes_that_work(),
        "problems": problems,
        "ranks": [_rank_report(plan, r) for r in ranks],
        "tensors": [_tensor_report(plan, m, s) for m, s in plan.parameters()] if known else [],
        "collectives": plan.collectives(),
        "experts": _expert_bytes(plan) if known and plan.geometry.experts_per_token else None,
        "vision": _vision_report(plan, DTYPE_BYTES[plan.dtype]) if known else {"mode": plan.vision},
    }


def _expert_bytes(plan: Plan) -> dict[str, list[int]]:
    """tensor_parallel.experts -> bytes of experts that each rank would hold."""
    either = {by: replace(plan, policy=plan.policy.experts_by(by)) for by in ("tensor", "expert")}
    return {by: [sum(count * p.tensor_bytes(module, suffix, rank) for claim, module, count in p.rows
                     if isinstance(claim.rule, Experts) for suffix in claim.parameters())
                 for rank in range(p.tp_size)] for by, p in either.items()}


def _rank_report(plan: Plan, rank: int) -> dict[str, Any]:
    text, vision = plan.heads["text"][rank], plan.heads["vision"][rank]
    return {"rank": rank, "q_heads": list(text.q), "kv_heads": list(text.kv), "vision_heads": list(vision.q),
            "weight_bytes": plan.weight_bytes(rank), "kv_bytes_per_token": plan.kv_bytes_per_token(rank),
            **({"state_bytes_per_sequence": state} if (state := plan.state_bytes(rank)) else {})}


def _tensor_report(plan: Plan, module: str, suffix: str) -> dict[str, Any]:
    parts = [plan.slice(module, suffix, r) for r in range(plan.tp_size)]
    rule = plan.claims[module].rule
    row: dict[str, Any] = {"name": f"{module}.{suffix}", "rule": type(rule).__name__, "shape": list(parts[0].shape)}
    if suffix == "weight" and (form := plan.format_of(module)).bits:
        row["format"] = form.name
    if isinstance(rule, Replicated):
        row["why"] = rule.why
    elif plan.whole_encoder and plan.in_encoder(module):
        row |= {"rule": Replicated.__name__, "why": f"tensor_parallel.vision: {plan.vision}"}
    return row | {"dim": parts[0].dim, "slices": [[list(r) for r in p.ranges] for p in parts]}


def _vision_report(plan: Plan, item: int) -> dict[str, Any]:
    """What `tensor_parallel.vision` comes to, as the command prints it."""
    encoder, price, ranks = plan.policy.encoder, cost(plan, item), range(plan.tp_size)
    shares = [_held(plan.divided, r, item) for r in ranks]
    held = [_held(plan, r, item) for r in ranks]
    examples = []
    for name, grid in EXAMPLES.items():
        assignment = assign(grid, plan.tp_size)
        examples.append({"what": name, "tensor": price.tensor(assignment.sizes), "data": price.data(assignment),
                         "auto": "data" if price.prefers_data(assignment) else "tensor"})
    return {
        "mode": plan.vision, "encoder": encoder.module, "held_bytes": held,
        "replica_bytes": [a - b for a, b in zip(held, shares, strict=True)],
        "cost": {"unit": "FLOPs of the slowest rank", "flops_per_byte": FLOPS_PER_BYTE,
                 "whole": vars(price.whole), "parts": [vars(part) for part in price.parts],
                 "all_reduce_bytes_per_patch": price.reduced, "gather_bytes_per_patch": price.gathered},
        "examples": examples,
    }


def _held(plan: Plan, rank: int, item: int) -> int:
    """Bytes of the encoder that `rank` holds."""
    return item * sum(count * math.prod(plan.slice(module, suffix, rank).local_shape)
                      for claim, module, count in plan.rows if plan.in_encoder(module)
                      for suffix in claim.parameters())


def _table(facts: dict[str, Any], tensors: bool) -> str:
    """The facts of a plan that cuts the model, for people; with `tensors` every row of the policy's table too."""
    def span(pair: list[int]) -> str:
        return f"{pair[0]}-{pair[1] - 1}" if pair[1] > pair[0] else "none"

    lines = [f"{facts['model_type']}, tp_size {facts['tp_size']}, {facts['dtype']}"
             + (f", weights {facts['format']}" if facts["format"] != "dense" else "")]
    lines += [f"adapter {a['path']}: merged into {a['weights']} weights, r {', '.join(map(str, a['r']))}"
              for a in facts.get("adapters", ())]
    lines += [f"tp sizes that work: {sizes_in_words(facts['valid_tp_sizes'])}"]
    lines += [f"rank {r['rank']}: query heads {span(r['q_heads'])}, KV heads {span(r['kv_heads'])}, vision heads "
              f"{span(r['vision_heads'])}, weights {r['weight_bytes'] / 1e9:.3f} GB, KV cache "
              f"{r['kv_bytes_per_token']} bytes a token"
              + (f", states {state / 1e6:.1f} MB a sequence" if (state := r.get("state_bytes_per_sequence")) else "")
              for r in facts["ranks"]]
    c = facts["collectives"]
    stacks = ", ".join(f"{stack} {count}" for stack, count in c["per_layer"].items())
    lines += [f"all-reduces per layer: {stacks}; for each new token: {c['per_token']} collectives, "
              f"{c['per_token_bytes']} bytes"]
    if facts["experts"]:
        lines += ["experts of the fullest rank, by tensor_parallel.experts: " + ", ".join(
            f"{by} {max(held) / 1e9:.3f} GB" for by, held in facts["experts"].items())]
    lines += _vision_lines(facts["vision"])
    return "\n".join(lines + (_tensor_lines(facts) if tensors else []))


def _tensor_lines(facts: dict[str, Any]) -> list[str]:
    """A line a tensor: of the layers of a stack only the first that has it, of the slices those of rank 0 and of the
    last rank."""
    first = dict[str, dict[str, Any]]()
    for tensor in facts["tensors"]:
        stack = next((s for s in facts["collectives"]["per_layer"] if tensor["name"].startswith(f"{s}.")), "")
        first.setdefault(re.sub(rf"^{re.escape(stack)}\.\d+\.", f"{stack}.*.", tensor["name"]), tensor)
    return [f"  {t['name']} {t['shape']} {t['rule']}" + (f" dim {t['dim']}: {t['slices'][0]} .. {t['slices'][-1]}"
            if t["dim"] is not None else "") for t in first.values()]


def _vision_lines(facts: dict[str, Any]) -> list[str]:
    """What the vision encoder takes in memory and, where ranks may read whole images, what both ways cost, for
    people."""
    how = {"tensor": "split over the ranks", "data": "whole on each rank, which reads whole images and frames",
           "auto": "whole on each rank; each call takes the cheaper way"}[facts["mode"]]
    first = f"vision encoder ({facts['mode']}): {how}; {max(facts['held_bytes']) / 1e9:.3f} GB a rank"
    if not any(facts["replica_bytes"]):
        return [first]
    width = max(len(example["what"]) for example in facts["examples"]) + 1
    return [f"{first}, {max(facts['replica_bytes']) / 1e9:.3f} GB more than split",
            "work of the busiest rank in GFLOP, what it sends counted as work too:",
            *(f"vision, {e['what'] + ':':{width}} split (tensor) {_giga(e['tensor']):>5}, whole images (data) "
              f"{_giga(e['data']):>5}; cheaper: {e['auto']}" for e in facts["examples"])]


def _giga(number: float) -> str:
    """Write a number in billions, with three digits or all that are before the point."""
    return f"{number / 1e9:.0f}" if number >= 1e11 else f"{number / 1e9:.3g}"


def start() -> NoReturn:
    from adapter.commands.forecast import add_options

    arguments = common.parser(__doc__)
    arguments.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    arguments.add_argument("--tensors", action="store_true", help="a line for each tensor of a layer too: rule, slices")
    add_options(arguments)
    common.run(main, arguments)


if __name__ == "__main__":
    start()
