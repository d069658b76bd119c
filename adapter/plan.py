"""Policy x config.json x tp_size -> Plan: every rank's slices, heads and bytes, and every problem, no weight read.

Imports neither torch nor DeepSpeed: it answers for a 72B in well under a second.

    python launch/plan.py --config configs/qwen2_vl_7b_tp4.yaml [--json] [key=value ...]
    python -m adapter.plan --config C ...    where it is installed

prints what each rank would own, before anything is loaded: heads, slices, bytes, collectives and every violated
constraint, from config.json and the headers of the safetensors files. Exit 2 where the plan has problems.
With --hardware configs/hardware/X.yaml it also predicts first token, tokens/s and memory on that machine.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from adapter import command, towers
from adapter.checkpoint import ITEM_BYTES, TORCH_NAMES, Checkpoint, open_checkpoint, read_config
from adapter.presharded import Shards, is_sharded, open_shards
from policies.errors import UserError, told
from policies.formats import DENSE, FORMATS, GROUP, Format, format_of
from policies.heads import HeadShard
from policies.policy import Geometry, Policy
from policies.registry import policy_for
from policies.rules import Claim, Replicated, Row, Split, TensorSlice, Vocab, slice_of

DTYPE_BYTES = {name: ITEM_BYTES[code] for code, name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class Plan:
    """How one model is cut for one tp_size.

    dtype: name of the dtype the shards are held in; vision: tensor_parallel.vision; form: the format of what
    `policies.formats` says takes one.
    """

    policy: Policy
    geometry: Geometry
    tp_size: int
    dtype: str
    vision: str = "tensor"
    form: Format = DENSE

    @property
    def whole_tower(self) -> bool:
        """Whether every rank holds the whole tower that reads pictures."""
        return self.vision != "tensor" and self.tp_size > 1

    def in_tower(self, module: str) -> bool:
        """Whether a module (published name, or a row of the table) is part of the tower that reads pictures."""
        return module.startswith(f"{self.policy.tower.module}.")

    @cached_property
    def divided(self) -> Plan:
        """What each rank computes with where every tower is split."""
        return replace(self, vision="tensor")

    @cached_property
    def alone(self) -> Plan:
        """What a rank computes with that runs a tower by itself."""
        return replace(self, tp_size=1, vision="tensor")

    @cached_property
    def claims(self) -> Mapping[str, Claim]:
        """Module (published name) -> its row of the table."""
        return self.policy.claims(self.geometry)

    @cached_property
    def splits(self) -> Mapping[str, Split]:
        return self.policy.splits(self.geometry, self.tp_size)

    @cached_property
    def heads(self) -> Mapping[str, tuple[HeadShard, ...]]:
        """Tower -> heads of every rank: those it computes where ranks compute together."""
        tower, heads = self.policy.tower.heads, self.policy.heads(self.geometry, self.tp_size)
        return heads | {tower: self.alone.heads[tower] * self.tp_size} if self.vision == "data" else heads

    def slice(self, module: str, suffix: str, rank: int) -> TensorSlice:
        """What `rank` holds of the parameter `module.suffix`."""
        if self.whole_tower and self.in_tower(module):
            return self.alone.slice(module, suffix, 0).whole
        return slice_of(self.claims[module], suffix, self.geometry.sizes, self.splits, rank)

    def parameters(self) -> Iterator[tuple[str, str]]:
        """(module, suffix) of every parameter that takes memory of its own, in the table's order."""
        for module, claim in self.claims.items():
            for suffix in claim.parameters():
                if not self.is_tied_copy(module, suffix):
                    yield module, suffix

    def is_tied_copy(self, module: str, suffix: str) -> bool:
        """Whether this parameter is another one under a second name."""
        return self.geometry.tied and f"{module}.{suffix}" == self.policy.tied[0]

    def weight_bytes(self, rank: int) -> int:
        """Bytes of `rank`'s shard, replicated tensors included, a tied head once."""
        return sum(self.tensor_bytes(m, s, rank) for m, s in self.parameters())

    def format_of(self, module: str) -> Format:
        """What this module's weight is held in."""
        return format_of(self.claims[module], self.form, self.geometry.text_stack)

    def tensor_bytes(self, module: str, suffix: str, rank: int) -> int:
        """Bytes of `rank`'s part of the parameter `module.suffix`."""
        shape, form = self.slice(module, suffix, rank).local_shape, self.format_of(module)
        if suffix == "weight" and form.bits:
            return form.bytes(*shape)
        return math.prod(shape) * DTYPE_BYTES[self.dtype]

    def off_group(self) -> list[str]:
        """Slices of quantised matrices that do not begin and end between two groups, in words."""
        found = {}
        for claim in self.policy.table:
            module = claim.module.replace("*", "0", 1)  # every layer is cut alike
            if not self.format_of(module).bits:
                continue
            for rank in range(self.tp_size):
                part = self.slice(module, "weight", rank)
                edges = [edge for pair in part.ranges for edge in pair if edge < part.shape[-1]]
                if part.dim == 1 and any(edge % GROUP for edge in edges):
                    found[claim.module] = f"of rank {rank} is inputs {part.ranges[0][0]} to {part.ranges[-1][1]}"
        return [f"weights.format {self.form.name}: {module} {what}, and a scale is shared by {GROUP}; use "
                "weights.format=dense or another tp_size" for module, what in found.items()]

    def sizes_that_work(self) -> list[int]:
        """tp sizes that the model can have in this format."""
        sizes = valid_tp_sizes(self.policy, self.geometry)
        return [n for n in sizes if not self.form.bits or not replace(self, tp_size=n).off_group()]

    def kv_bytes_per_token(self, rank: int) -> int:
        """Keys and values of one token in every text layer, for the KV heads this rank holds."""
        shard = self.heads["text"][rank]
        layers = self.geometry.layers[self.geometry.text_stack]
        return 2 * layers * shard.kv_heads * shard.head_dim * DTYPE_BYTES[self.dtype]

    def collectives(self) -> dict[str, Any]:
        """All-reduces per layer of each stack, and the bytes one new token puts into collectives on each rank."""
        item, sizes = DTYPE_BYTES[self.dtype], self.geometry.sizes
        per_layer = {
            stack: sum(isinstance(c.rule, Row) and c.module.startswith(f"{stack}.*.") for c in self.policy.table)
            for stack in self.geometry.layers
        }
        text = self.geometry.text_stack
        embeds = sum(isinstance(c.rule, Vocab) for c in self.policy.table)
        reduces = per_layer[text] * self.geometry.layers[text] + embeds
        reduced, gathered = reduces * sizes["hidden"] * item, sizes["vocab"] * item
        if self.vision == "data":
            per_layer[self.policy.tower.stack] = 0  # one gather of the features, whatever the number of layers
        if self.tp_size == 1:
            reduces = reduced = gathered = 0
        return {"per_layer": per_layer, "per_token": reduces + bool(gathered), "per_token_bytes": reduced + gathered,
                "per_token_all_reduce_bytes": reduced, "per_token_gathered_logits_bytes": gathered}


def valid_tp_sizes(policy: Policy, geometry: Geometry) -> list[int]:
    """Every tp_size that violates nothing; none can be above the most heads of any tower."""
    most = max(a.q_heads for a in geometry.attention.values())
    return [n for n in range(1, most + 1) if not policy.problems(geometry, n)]


def make_plan(directory: Path, tp_size: int, dtype: str,
              vision: str = "tensor", form: str = "dense") -> tuple[Plan, Checkpoint | Shards | None, list[str]]:
    """The plan for a model directory, its weights (None where it holds none) and every problem found.

    Raises UserError only where there is nothing to plan (no config.json, unknown model type, impossible numbers in it).
    """
    config = read_config(directory)
    policy = policy_for(config, str(directory / "config.json"))
    geometry = policy.geometry(config)
    problems = policy.problems(geometry, tp_size)
    plan = Plan(policy, geometry, tp_size, dtype, vision, FORMATS[form])
    if is_sharded(directory):
        shards = open_shards(directory, plan)
        return plan, shards, problems + shards.problems
    checkpoint = open_checkpoint(directory, policy)
    if checkpoint is not None:
        problems += checkpoint.check(policy, geometry)
    if not problems:
        problems += plan.off_group()
    return plan, checkpoint, problems


def checked_plan(directory: Path, tp_size: int, dtype: str, vision: str = "tensor",
                 form: str = "dense") -> tuple[Plan, Checkpoint | Shards]:
    """The plan and the weights, both sound. Raises one UserError with every problem and the tp sizes that work."""
    plan, checkpoint, problems = make_plan(directory, tp_size, dtype, vision, form)
    if isinstance(checkpoint, Shards) and problems:
        raise UserError("\n  ".join([f"{directory}: these shards cannot be loaded:", *told(problems)]))
    if checkpoint is None:
        problems.append("no safetensors file here (model.safetensors or model.safetensors.index.json); other formats "
                        "can run code when they are opened: convert with Transformers' save_pretrained")
    require(problems, plan, str(directory))
    assert checkpoint is not None
    return plan, checkpoint


def require(problems: list[str], plan: Plan, what: str) -> None:
    """Raise one UserError with every problem and the tp sizes that would work; nothing where there is none."""
    if problems:
        raise UserError(f"{what} cannot run at tp_size {plan.tp_size}:\n  " + "\n  ".join(told(problems))
                        + f"\ntp sizes that would work: {plan.sizes_that_work() or 'none'}")


def report(plan: Plan, problems: list[str]) -> dict[str, Any]:
    """The plan as plain data, as launch/plan.py prints it."""
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
        "vision": towers.report(plan, DTYPE_BYTES[plan.dtype]) if known else {"mode": plan.vision},
    }


def _rank_report(plan: Plan, rank: int) -> dict[str, Any]:
    text, vision = plan.heads["text"][rank], plan.heads["vision"][rank]
    return {"rank": rank, "q_heads": list(text.q), "kv_heads": list(text.kv), "vision_heads": list(vision.q),
            "weight_bytes": plan.weight_bytes(rank), "kv_bytes_per_token": plan.kv_bytes_per_token(rank)}


def _tensor_report(plan: Plan, module: str, suffix: str) -> dict[str, Any]:
    parts = [plan.slice(module, suffix, r) for r in range(plan.tp_size)]
    rule = plan.claims[module].rule
    row: dict[str, Any] = {"name": f"{module}.{suffix}", "rule": type(rule).__name__, "shape": list(parts[0].shape)}
    if suffix == "weight" and (form := plan.format_of(module)).bits:
        row["format"] = form.name
    if isinstance(rule, Replicated):
        row["why"] = rule.why
    elif plan.whole_tower and plan.in_tower(module):
        row |= {"rule": Replicated.__name__, "why": f"tensor_parallel.vision: {plan.vision}"}
    return row | {"dim": parts[0].dim, "slices": [[list(r) for r in p.ranges] for p in parts]}


def main(args: argparse.Namespace, results: command.Results) -> int:
    from adapter.config import load_config
    from adapter.forecast import forecast

    config = load_config(args.config, args.overrides)
    plan, checkpoint, problems = make_plan(config.model.path, config.tensor_parallel.tp_size, config.model.dtype,
                                           config.tensor_parallel.vision, config.weights.format)
    facts = report(plan, problems)
    if checkpoint is None:
        print(f"note: {config.model.path} holds no safetensors file; planned from config.json alone", file=sys.stderr)
    foreseen = None if problems else forecast(plan, args)
    if args.json:
        results.write(facts | ({"prediction": foreseen[0]} if foreseen else {}))
    else:
        results.text(_table(facts) + (f"\n\n{foreseen[1]}" if foreseen else ""))
    return command.BAD_INPUT if problems else command.DONE


def _table(facts: dict[str, Any]) -> str:
    """The same facts for people; tensors by their row of the policy, slices of rank 0 and the last rank."""
    def span(pair: list[int]) -> str:
        return f"{pair[0]}-{pair[1] - 1}" if pair[1] > pair[0] else "none"

    lines = [f"{facts['model_type']}, tp_size {facts['tp_size']}, {facts['dtype']}"
             + (f", weights {facts['format']}" if facts["format"] != "dense" else "")]
    lines += [f"problem: {p}" for p in facts["problems"]]
    lines += [f"tp sizes that work: {facts['valid_tp_sizes']}"]
    lines += [f"rank {r['rank']}: query heads {span(r['q_heads'])}, KV heads {span(r['kv_heads'])}, vision heads "
              f"{span(r['vision_heads'])}, weights {r['weight_bytes'] / 1e9:.3f} GB, KV cache "
              f"{r['kv_bytes_per_token']} bytes a token" for r in facts["ranks"]]
    reduce, c = facts["collectives"]["per_layer"], facts["collectives"]
    lines += [f"all-reduces per layer: {reduce}; a token: {c['per_token']} collectives, {c['per_token_bytes']} bytes"]
    lines += towers.lines(facts["vision"]) if facts["ranks"] else []
    shown = [t for t in facts["tensors"] if not any(
        t["name"].startswith(f"{stack}.") and not t["name"].startswith(f"{stack}.0.") for stack in reduce)]
    lines += [f"  {t['name']} {t['shape']} {t['rule']}" + (f" dim {t['dim']}: {t['slices'][0]} .. {t['slices'][-1]}"
              if t["dim"] is not None else "") for t in shown]
    return "\n".join(lines)


def start() -> NoReturn:
    from adapter.forecast import add_options

    arguments = command.parser(__doc__)
    arguments.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    add_options(arguments)
    command.run(main, arguments)


if __name__ == "__main__":
    start()
