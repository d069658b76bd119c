"""Plan x Hardware x Workload -> Prediction: what a first token, a decode step and a rank's memory are made of.

A roofline with an alpha-beta model of the collectives. What a rank computes, reads and sends follows from the policy's
table (rule and dimensions of every row, its slice on that rank) and from heads; no model is known here:

* a linear layer with [out, in] weights over r rows: 2 x out x in x r FLOP, at the rate of model.dtype whatever the
  weights' format; they are read once a forward; a row-parallel one and the embedding end in an all-reduce, the output
  projection in a gather.
* attention over p patches of one image: 4 x head_dim x p^2 FLOP a head; over a prompt of s tokens, causal: 4 x
  head_dim x s (s + 1) / 2; for one new token over c cached ones: 4 x head_dim x c. Where a layer attends in windows
  of w patches, p x min(p, w) stands for p^2, as if no window were cut off at a border.
* layers with a recurrence (roughly): 6 FLOP a token for each number of their state, as if it were updated token by
  token; the state is read and written once a forward. Its convolution counts as a linear layer.
* seconds of a forward: max(FLOP / rate, bytes read / bandwidth) + collectives + overhead, of the slowest rank.

Not counted: reading and resizing images, tokenising, norms and other element-wise work over many rows, padding of a
batch. Nothing is taken to overlap: where launches run ahead of an accelerator, overhead is partly hidden. Attention is
assumed never to hold its scores (attn_implementation eager does).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapter.planning.hardware import Hardware
from adapter.planning.plan import DTYPE_BYTES, Plan
from policies.policy import Rows
from policies.rules import Claim, Experts, Head, InPlace, Row, Vocab

TEXT_TOKENS = 27  # of a short question in the chat template


@dataclass(frozen=True)
class Workload:
    """A batch of `batch` equal prompts. prompt_tokens: of one prompt, its images' included. patches: of each of its
    images, before merging. new_tokens: generated for each; the step that is predicted is the middle one.
    """

    prompt_tokens: int
    patches: tuple[int, ...] = ()
    new_tokens: int = 32
    batch: int = 1

    @property
    def context(self) -> int:
        """Tokens in the KV cache of one sequence, halfway through."""
        return self.prompt_tokens + self.new_tokens // 2


@dataclass(frozen=True)
class Work:
    """What one rank does in one forward: counts, and bytes. A multiplication and an addition are two FLOP.

    sent_bytes: by this rank in all collectives, as rings of n ranks make them: 2 (n-1)/n of what is reduced, (n-1)/n of
    what is gathered (Thakur, Rabenseifner, Gropp: Optimization of Collective Communication Operations in MPICH, 2005).
    """

    layers: int = 0
    linear_flop: int = 0
    attention_flop: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0
    collectives: int = 0
    sent_bytes: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Phase:
    """One forward on its slowest rank, in seconds of each kind."""

    rank: int
    work: Work
    compute_s: float
    read_s: float
    collective_s: float
    overhead_s: float

    @property
    def total_s(self) -> float:
        return max(self.compute_s, self.read_s) + self.collective_s + self.overhead_s


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank, and of the memory (`available`) that `ranks` of them share."""

    rank: int
    weights: int
    kv: int
    activations: int
    process: float
    ranks: int
    available: float

    @property
    def total(self) -> float:
        return self.weights + self.kv + self.activations + self.process

    @property
    def fits(self) -> bool:
        return self.ranks * self.total <= self.available


@dataclass(frozen=True)
class Prediction:
    """phases: "vision", where the prompt has an image, "prefill", and "decode": a step for all sequences together."""

    tp_size: int
    phases: Mapping[str, Phase]
    memory: Memory

    @property
    def decode(self) -> Phase:
        return self.phases["decode"]

    @property
    def first(self) -> tuple[Phase, ...]:
        """The forwards before the first token."""
        return tuple(phase for name, phase in self.phases.items() if name != "decode")

    @property
    def ttft_s(self) -> float:
        return sum(phase.total_s for phase in self.first)

    @property
    def decode_tok_s(self) -> float:
        """New tokens a second of one sequence; the batch makes `batch` times as many."""
        return 1 / self.decode.total_s


def predict(plan: Plan, hardware: Hardware, load: Workload) -> Prediction:
    """Raises UserError where the hardware file lacks what this plan needs."""
    works: dict[str, Callable[[int], Work]] = {
        "vision": lambda rank: vision_work(plan, load, rank),
        "prefill": lambda rank: text_work(plan, load.batch, load.prompt_tokens, 0, rank),
        "decode": lambda rank: text_work(plan, load.batch, 1, load.context, rank),
    }
    if not load.patches:
        del works["vision"]
    ranks = _unlike_ranks(plan)
    phases = {name: max((_phase(plan, hardware, rank, work(rank)) for rank in ranks), key=lambda p: p.total_s)
              for name, work in works.items()}
    memory = max((_memory(plan, hardware, load, rank) for rank in ranks), key=lambda m: m.total)
    return Prediction(plan.tp_size, phases, memory)


def predict_all(plan: Plan, hardware: Hardware, load: Workload) -> list[Prediction]:
    """The same for every tp_size the model can be cut into; tp_size 1 alone where the file knows no collectives."""
    sizes = plan.sizes_that_work() if hardware.all_reduce else [1]
    return [predict(replace(plan, tp_size=n), hardware, load) for n in sizes]


def vision_work(plan: Plan, load: Workload, rank: int) -> Work:
    """Every image of the batch in one forward; attention stays within an image."""
    geometry, encoder, patches = plan.geometry, plan.policy.encoder, load.batch * sum(load.patches)
    shard, layers = plan.heads[encoder.heads][rank], geometry.layers[encoder.stack]
    whole = (layers - geometry.windowed_layers) * sum(p * p for p in load.patches)
    windows = geometry.windowed_layers * sum(p * min(p, geometry.window_patches) for p in load.patches)
    attention = Work(layers=layers, attention_flop=4 * shard.head_dim * shard.slots * load.batch * (whole + windows))
    return attention + _table_work(plan, rank, {"patch": patches, "merged": patches // geometry.merge_side ** 2})


def text_work(plan: Plan, batch: int, tokens: int, cached: int, rank: int) -> Work:
    """`tokens` new ones of every sequence, each of which attends to `cached` ones and to the new up to itself."""
    shard, layers = plan.heads["text"][rank], plan.geometry.layers[plan.geometry.text_stack]
    scores = batch * (tokens * cached + tokens * (tokens + 1) // 2)
    states = plan.state_bytes(rank)  # three products over a state of float32: 6 FLOP of each 4 bytes
    attention = Work(layers=layers, attention_flop=4 * shard.head_dim * shard.slots * plan.attending_layers * scores
                     + batch * tokens * states * 3 // 2,
                     kv_bytes=batch * (cached * plan.kv_bytes_per_token(rank) + 2 * states))
    return attention + _table_work(plan, rank, {"token": batch * tokens, "last": batch})


def _unlike_ranks(plan: Plan) -> list[int]:
    """One rank of each kind: ranks with equal slices and heads do the same work."""
    kinds: dict[tuple[Any, ...], int] = {}
    for rank in range(plan.tp_size):
        lengths = [split.ranges[rank][1] - split.ranges[rank][0] for split in plan.splits.values()]
        heads = [(shards[rank].slots, shards[rank].kv_heads) for shards in plan.heads.values()]
        kinds.setdefault((*lengths, *heads), rank)
    return list(kinds.values())


def _table_work(plan: Plan, rank: int, rows: Mapping[Rows, int]) -> Work:
    """The work of the table's entries that compute on one of `rows`, a kind of input row -> how many there are."""
    work = Work()
    for claim, module, count in plan.rows:
        if (unit := plan.policy.rows_of(claim.module)) in rows:
            work += _module_work(plan, claim, module, count, rank, rows[unit])
    return work


def _module_work(plan: Plan, claim: Claim, module: str, modules: int, rank: int, rows: int) -> Work:
    """The work of `modules` modules like this one, those of one entry of the table, each over `rows` rows of input."""
    ranks, used = plan.tp_size, _used(plan, claim)
    parts = [plan.slice(module, suffix, rank) for suffix in claim.parameters() if suffix != "bias"]
    looked_up = isinstance(claim.rule, Vocab)
    times_sent = 2 if isinstance(claim.rule, Row | Vocab | Experts) else int(isinstance(claim.rule, Head))
    width = parts[-1].shape[1 if looked_up or used < 1 else 0]  # of the output, summed over ranks or gathered from them
    sent = times_sent * (ranks - 1) / ranks * rows * width * DTYPE_BYTES[plan.dtype]
    held = sum(plan.tensor_bytes(module, suffix, rank) for suffix in claim.parameters())
    products = sum(math.prod(part.local_shape) for part in parts if len(part.shape) > 1)
    return Work(
        linear_flop=0 if looked_up else int(2 * modules * rows * used * products),
        weight_bytes=0 if looked_up else int(modules * held * min(1, rows * used)),
        collectives=modules if sent else 0, sent_bytes=modules * sent,
    )


def _used(plan: Plan, claim: Claim) -> float:
    """The share of a module's weights that one row of input meets: of experts those that the router chooses."""
    if not isinstance(claim.rule, Experts):
        return 1
    return plan.geometry.experts_per_token / plan.geometry.sizes["experts"]


def _outputs(plan: Plan, claim: Claim, module: str, rank: int) -> int:
    """Numbers that a rank's part of a module computes for one row of input."""
    if isinstance(claim.rule, InPlace):
        return 0
    if isinstance(claim.rule, Experts):
        first = plan.slice(module, next(iter(claim.parameters())), rank)
        return plan.geometry.experts_per_token * first.local_shape[1] + plan.geometry.sizes["hidden"]
    return plan.slice(module, "weight", rank).local_shape[0]


def _phase(plan: Plan, hardware: Hardware, rank: int, work: Work) -> Phase:
    ranks, efficiency = plan.tp_size, hardware.efficiency
    devices, flop_s = hardware.devices_per_rank(ranks), hardware.tflop_s(plan.dtype) * 1e12
    flop = work.linear_flop / efficiency.matmul + work.attention_flop / efficiency.attention
    overhead_us = work.layers * hardware.per_layer_overhead_us + hardware.per_step_overhead_us
    return Phase(
        rank, work,
        compute_s=flop / (flop_s * devices),
        read_s=(work.weight_bytes + work.kv_bytes) / (hardware.read_gb_s(ranks) * 1e9),
        collective_s=hardware.collective_s(ranks, work.collectives, work.sent_bytes),
        overhead_s=overhead_us * 1e-6 / min(1.0, devices),
    )


def _memory(plan: Plan, hardware: Hardware, load: Workload, rank: int) -> Memory:
    """The memory of one rank. Activations are everything that a layer of the larger of both stacks computes, alive
    at once, the pixels in float32, and the logits."""
    item, patches = DTYPE_BYTES[plan.dtype], load.batch * sum(load.patches)
    outputs: dict[Rows, int] = {}
    for claim, module, _ in plan.rows:
        if "*" in claim.module:
            unit = plan.policy.rows_of(claim.module)
            outputs[unit] = outputs.get(unit, 0) + _outputs(plan, claim, module, rank)
    tokens = load.batch * load.prompt_tokens
    activations = item * max(patches * outputs.get("patch", 0), tokens * outputs.get("token", 0))
    activations += patches * plan.geometry.patch_values * DTYPE_BYTES["float32"]
    activations += load.batch * plan.geometry.sizes["vocab"] * item
    kv = load.batch * ((load.prompt_tokens + load.new_tokens) * plan.kv_bytes_per_token(rank) + plan.state_bytes(rank))
    return Memory(rank, plan.weight_bytes(rank), kv, activations, hardware.process_memory_gb * 1e9,
                  hardware.ranks_per_memory(plan.tp_size), hardware.memory_gb * 1e9)
