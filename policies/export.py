"""A family's table in the words of three stock tools, for those who run one of them without the adapter.

    injection_policy   deepspeed.init_inference(model, injection_policy={LayerClass: ...}, tensor_parallel={...})
    partition_config   deepspeed.initialize(model=model, config={"tensor_parallel": ..., ...})
    tp_plan            from_pretrained(path, distributed_config=DistributedConfig(tp_size=N, tp_plan=...))

Taken from DeepSpeed 0.19.8 and Transformers 5.23.0. DeepSpeed has `injection_policy` since before 0.16, and
`partition_config` since 0.18.6, with `gather_output` since 0.19.4. `python -m policies MODEL` prints any of them.

A dialect cuts what its consumer was seen to compute correctly and no more (tests/parity/test_stock_consumers.py runs
each against one process): `Translation.whole` names what stays whole on every rank there, and why. Where the consumer
would compute wrong numbers, fail, or leave ranks without heads, it refuses, with the nearest tp sizes that it can do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from policies.errors import UserError
from policies.policy import Attention, Geometry, Policy
from policies.rules import Claim, Column, FusedQKV, Head, Replicated, Row, Rule, Vocab

Kind = frozenset[type[Rule]]
Vocabulary = Mapping[Kind, Mapping[type[Rule], Any]]

# A block is the linears of one module: cut as one or not at all, since its row-parallel linear takes what its
# column-parallel ones leave on the rank. Its kind is the set of rules in it.
PAIR, FUSED, VOCAB, HEAD = (frozenset(k) for k in ({Column, Row}, {FusedQKV, Row}, {Vocab}, {Head}))

PARTITION_WORDS: Vocabulary = MappingProxyType({
    PAIR: {Column: {"partition_type": "column"}, Row: {"partition_type": "row"}},
    FUSED: {FusedQKV: {"partition_type": "column", "shape": [3, -1], "partition_dim": 0},
            Row: {"partition_type": "row"}},
    HEAD: {Head: {"partition_type": "column", "gather_output": True}},
})
PLAN_WORDS: Vocabulary = MappingProxyType({
    PAIR: {Column: "colwise", Row: "rowwise"},
    # The attention module reshapes by a head count no plan can change, so it gets all heads; its weights are cut.
    FUSED: {FusedQKV: "colwise_gather_output", Row: "rowwise_split_input"},
    VOCAB: {Vocab: "embedding_rowwise"},
    HEAD: {Head: "colwise_gather_output"},
})
SKIP = {"partition_type": "skip"}  # of each row that stays whole: in strict mode a linear with no spec is an error

ADAPTER = "adapter.init_inference and adapter.deepspeed_kwargs cut it at any tp_size up to the query heads"


@dataclass(frozen=True)
class Translation:
    """This is a table in one consumer's words, as it takes them; `whole`: row that stays whole on every rank -> why."""

    words: dict[str, Any]
    whole: dict[str, str]


def row_parallel(policy: Policy) -> dict[str, tuple[str, ...]]:
    """Layer stack ("model.layers") -> the row-parallel linears inside one of its layers.

    All that DeepSpeed's `injection_policy` can hold. It keys the same by the layer's class; who has the model at hand
    looks that up, since class names differ between Transformers releases.
    """
    found: dict[str, tuple[str, ...]] = {}
    for claim in policy.table:
        if isinstance(claim.rule, Row) and ".*." in claim.module:
            stack, inner = claim.module.split(".*.", 1)
            found[stack] = (*found.get(stack, ()), inner)
    return found


def injection_policy(policy: Policy, geometry: Geometry, tp_size: int) -> Translation:
    """Stack -> row-parallel linears, for a model DeepSpeed cuts itself: every other linear of those layers by columns.

    DeepSpeed wants the class of the stack's layers as the key. It cuts lm_head too, unasked and correctly. A stack that
    has a fused QKV must not be given to it: it cuts q | k | v across and computes wrong numbers without a word.
    Raises UserError where a rank would be left without heads.
    """
    _require("injection_policy", policy, geometry, tp_size)
    blocks = _blocks(policy)
    wrong = {m.split(".*.", 1)[0] for m, rows in blocks.items() if ".*." in m and _kind(rows) != PAIR}
    whole: dict[str, str] = {}
    for module, rows in blocks.items():
        stack = module.split(".*.", 1)[0]
        if ".*." not in module:
            why = "an injection policy holds the layers of a stack and nothing else"
        elif stack in wrong:
            why = "DeepSpeed cuts every linear of a layer it is given, and a fused QKV across q, k and v: wrong numbers"
        else:
            continue
        whole |= {row.module: why for row in rows if not isinstance(row.rule, Head)}
    return Translation({stack: rows for stack, rows in row_parallel(policy).items() if stack not in wrong}, whole)


def partition_config(policy: Policy, geometry: Geometry, tp_size: int) -> Translation:
    """The `tensor_parallel` section of a deepspeed.initialize config: autotp_size and partition_config.

    One spec a row, with the names of published checkpoints and those of newer releases; whole rows are listed as
    skipped, and anything else is an error (strict_mode). Raises UserError where a rank would be left without heads.
    """
    _require("partition_config", policy, geometry, tp_size)
    specs: list[dict[str, Any]] = []
    whole: dict[str, str] = {}
    for module, rows in _blocks(policy).items():
        why = _whole_in_partition_config(module, rows, geometry, tp_size)
        whole |= {row.module: why for row in rows if why}
        specs += [{
            "patterns": [_regex(name) for name in _names(policy, row.module)], "model_types": [policy.model_type],
            **(SKIP if why else PARTITION_WORDS[_kind(rows)][type(row.rule)]),
        } for row in rows]
    config = {"use_default_specs": False, "strict_mode": True, "layer_specs": specs}
    return Translation({"autotp_size": tp_size, "partition_config": config}, whole)


def _whole_in_partition_config(module: str, rows: list[Claim], geometry: Geometry, tp_size: int) -> str | None:
    """Why DeepSpeed must leave this block whole, None where it need not."""
    kind = _kind(rows)
    if kind not in PARTITION_WORDS:
        return "DeepSpeed cuts an embedding by hidden size and gathers nothing"
    if kind == HEAD and geometry.tied:
        return "tied to the embedding, which stays whole"
    if kind == PAIR and ".*." not in module:
        return "DeepSpeed divides hidden_size in the module above a cut linear, and that module reshapes by it"
    if kind == FUSED:
        return _misaligned(geometry, tp_size)
    return None


def _misaligned(geometry: Geometry, tp_size: int) -> str | None:
    """Whether DeepSpeed's cut of a fused QKV falls between heads: it cuts by the text encoder's KV heads, if it can."""
    vision, kv_heads = geometry.attention["vision"], geometry.attention["text"].kv_heads
    widths = _deepspeed_shares(vision.q_heads * vision.head_dim, kv_heads, tp_size)
    heads = _deepspeed_shares(vision.q_heads, kv_heads, tp_size)
    if all(h and w == h * vision.head_dim for w, h in zip(widths, heads, strict=True)):
        return None
    return (f"DeepSpeed would give {vision.q_heads} vision heads of {vision.head_dim} to {tp_size} ranks as "
            f"{', '.join(map(str, widths))} elements, for {', '.join(map(str, heads))} heads")


def _deepspeed_shares(total: int, kv_heads: int, tp_size: int) -> list[int]:
    """What deepspeed.module_inject.tp_shard.get_shard_size gives each rank: units of a KV head where they divide."""
    units = kv_heads if total % kv_heads == 0 else total
    return [total // units * (units // tp_size + (rank < units % tp_size)) for rank in range(tp_size)]


def tp_plan(policy: Policy, geometry: Geometry, tp_size: int) -> Translation:
    """Module pattern, as Transformers 5 names modules -> style. Raises UserError where KV heads do not divide."""
    _require("tp_plan", policy, geometry, tp_size)
    words, whole = {}, {}
    for rows in _blocks(policy).values():
        numbered = any(part.isdigit() for row in rows for part in row.module.split("."))
        for row in rows:
            if numbered:
                whole[row.module] = "a plan writes every number in a name as *: it has one style for .0 and .2"
            else:
                words[_names(policy, row.module)[-1]] = PLAN_WORDS[_kind(rows)][type(row.rule)]
    return Translation(words, whole)


DIALECTS: Mapping[str, Callable[[Policy, Geometry, int], Translation]] = MappingProxyType({
    "injection_policy": injection_policy, "partition_config": partition_config, "tp_plan": tp_plan,
})


def _deepspeed_heads(text: Attention, tp_size: int) -> list[str]:
    if tp_size <= text.kv_heads:
        return []
    return [f"KV replication: {text.kv_heads} KV heads for {tp_size} ranks. DeepSpeed gives each KV head, with its "
            f"{text.q_heads // text.kv_heads} query heads, to one rank; {tp_size - text.kv_heads} would have none"]


def _transformers_heads(text: Attention, tp_size: int) -> list[str]:
    if text.kv_heads % tp_size == 0:
        return []
    what = "KV replication" if tp_size > text.kv_heads else "uneven heads"
    return [f"{what}: {text.kv_heads} KV heads for {tp_size} ranks. Transformers cuts the {text.kv_heads} x "
            f"{text.head_dim} rows of k_proj and v_proj into {tp_size} equal parts, through the heads"]


HEADS: Mapping[str, Callable[[Attention, int], list[str]]] = MappingProxyType({
    "injection_policy": _deepspeed_heads, "partition_config": _deepspeed_heads, "tp_plan": _transformers_heads,
})


def _require(dialect: str, policy: Policy, geometry: Geometry, tp_size: int) -> None:
    """Raises UserError with everything that keeps this dialect's consumer from running it, and the nearest sizes."""
    if dialect not in policy.dialects:
        raise UserError(f"{policy.model_type} as {dialect}: the tool that takes it has not run this family's table, so "
                        f"nobody knows whether it computes the right numbers. {ADAPTER}.")
    problems = _problems(dialect, policy, geometry, tp_size)
    if problems:
        known = [n for n in range(1, geometry.attention["text"].q_heads + 1)
                 if not _problems(dialect, policy, geometry, n)]
        near = [*[n for n in known if n < tp_size][-1:], *[n for n in known if n > tp_size][:1]]
        raise UserError("\n  ".join([f"{policy.model_type} as {dialect} at tp_size {tp_size}:", *problems])
                        + f"\nNearest tp sizes it can say: {', '.join(map(str, near)) or 'none'}. {ADAPTER}.")


def _problems(dialect: str, policy: Policy, geometry: Geometry, tp_size: int) -> list[str]:
    heads = HEADS[dialect](geometry.attention["text"], tp_size) if tp_size >= 1 else []
    return policy.problems(geometry, tp_size) + heads


def _blocks(policy: Policy) -> dict[str, list[Claim]]:
    """Module -> the rows right under it that are cut; "" for those of the model itself."""
    blocks: dict[str, list[Claim]] = {}
    for claim in policy.table:
        if not isinstance(claim.rule, Replicated):
            blocks.setdefault(claim.module.rpartition(".")[0], []).append(claim)
    return blocks


def _kind(rows: list[Claim]) -> Kind:
    return frozenset(type(row.rule) for row in rows)


def _names(policy: Policy, module: str) -> list[str]:
    """The published name, and the newer one if it differs."""
    newer = next((new + module[len(old):] for new, old in policy.renames if module.startswith(old)), module)
    return list(dict.fromkeys([module, newer]))


def _regex(module: str) -> str:
    return "^" + module.replace(".", r"\.").replace("*", r"\d+") + r"\.weight$"
