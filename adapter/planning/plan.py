"""Policy x config.json x tp_size -> Plan: every rank's slices, heads and bytes, and every problem, no weight read.

Imports neither torch nor DeepSpeed: it answers for a 72B in well under a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from adapter.checkpoint.safetensors import DENSE as DENSE_CODES
from adapter.checkpoint.safetensors import ITEM_BYTES, TORCH_NAMES
from policies.formats import DENSE, GROUP, Format, format_of
from policies.heads import HeadShard
from policies.policy import Geometry, Policy
from policies.rules import Claim, Experts, Row, Split, TensorSlice, Vocab, slice_of

DTYPE_BYTES = {TORCH_NAMES[code]: ITEM_BYTES[code] for code in DENSE_CODES}


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
    def whole_encoder(self) -> bool:
        """Whether every rank holds the whole encoder that reads images."""
        return self.vision != "tensor" and self.tp_size > 1

    def in_encoder(self, module: str) -> bool:
        """Whether a module (published name, or a row of the table) is part of the encoder that reads images."""
        return module.startswith(f"{self.policy.encoder.module}.")

    @cached_property
    def divided(self) -> Plan:
        """What each rank computes with where every encoder is split."""
        return replace(self, vision="tensor")

    @cached_property
    def alone(self) -> Plan:
        """What a rank computes with that runs an encoder by itself."""
        return replace(self, tp_size=1, vision="tensor")

    @cached_property
    def claims(self) -> Mapping[str, Claim]:
        """Module (published name) -> its row of the table."""
        return self.policy.claims(self.geometry)

    @cached_property
    def rows(self) -> tuple[tuple[Claim, str, int], ...]:
        """Each row of the table that stands for some module: the row, the first of them, their number. A rank has the
        same part of each."""
        found = [(claim, self.policy.modules(claim, self.geometry)) for claim in self.policy.table]
        return tuple((claim, modules[0], len(modules)) for claim, modules in found if modules)

    @cached_property
    def splits(self) -> Mapping[str, Split]:
        return self.policy.splits(self.geometry, self.tp_size)

    @cached_property
    def heads(self) -> Mapping[str, tuple[HeadShard, ...]]:
        """Encoder -> heads of every rank: those it computes where ranks compute together."""
        encoder, heads = self.policy.encoder.heads, self.policy.heads(self.geometry, self.tp_size)
        return heads | {encoder: self.alone.heads[encoder] * self.tp_size} if self.vision == "data" else heads

    def slice(self, module: str, suffix: str, rank: int) -> TensorSlice:
        """What `rank` holds of the parameter `module.suffix`."""
        if self.whole_encoder and self.in_encoder(module):
            return self.alone.slice(module, suffix, 0).whole
        return slice_of(self.claims[module], suffix, self.geometry.sizes, self.splits, rank)

    def parameters(self) -> Iterator[tuple[str, str]]:
        """(module, suffix) of every parameter that takes memory of its own, in the table's order."""
        for module, claim in self.claims.items():
            for suffix in claim.parameters():
                if not self.is_tied_copy(module, suffix):
                    yield module, suffix

    def place_of(self, name: str) -> tuple[str, str]:
        """(module, suffix) of a parameter's name: of "a.conv1d.weight" that of `a`, where the table has it there."""
        return self._places[name]

    @cached_property
    def _places(self) -> Mapping[str, tuple[str, str]]:
        return {f"{module}.{suffix}": (module, suffix) for module, claim in self.claims.items()
                for suffix in claim.parameters()}

    def is_tied_copy(self, module: str, suffix: str) -> bool:
        """Whether this parameter is another one under a second name."""
        return self.geometry.tied and f"{module}.{suffix}" == self.policy.tied[0]

    def weight_bytes(self, rank: int) -> int:
        """Bytes of `rank`'s shard, replicated tensors included, a tied head once."""
        return sum(count * self.tensor_bytes(module, suffix, rank) for claim, module, count in self.rows
                   for suffix in claim.parameters() if not self.is_tied_copy(module, suffix))

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
        if self.form.bits and self.geometry.experts_per_token:
            return [f"weights.format {self.form.name}: experts have no such format; use weights.format=dense"]
        if self.form.bits and self.policy.delta_net:
            return [f"weights.format {self.form.name}: nobody has tried what it does to the decays of linear layers; "
                    "use weights.format=dense"]
        for claim, module, _ in self.rows:
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
        """Keys and values of one token in every text layer that attends, for the KV heads this rank holds."""
        shard, layers = self.heads["text"][rank], self.attending_layers
        return 2 * layers * shard.kv_heads * shard.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def attending_layers(self) -> int:
        """Text layers that have keys and values."""
        rows = (row for row in self.policy.head_numbers if row.encoder == "text")
        return sum(len(self.policy.modules(row, self.geometry)) for row in rows)

    def state_bytes(self, rank: int) -> int:
        """What the layers with a recurrence keep of one sequence, however long: of each the last tokens before the
        convolution, in the model's dtype, and the state in float32, [value heads, key dim, value dim]."""
        net = self.policy.delta_net
        if net is None:
            return 0
        keys, values = (_length(self.splits[axis], rank) for axis in (net.key, net.value))
        state = values * self.policy.rows_of_a_head(net.key, self.geometry) * DTYPE_BYTES["float32"]
        convolved = (2 * keys + values) * self.geometry.sizes[net.width] * DTYPE_BYTES[self.dtype]
        return len(self.policy.modules(net, self.geometry)) * (state + convolved)

    def collectives(self) -> dict[str, Any]:
        """All-reduces per layer of each stack, and the bytes one new token puts into collectives on each rank."""
        item, sizes = DTYPE_BYTES[self.dtype], self.geometry.sizes
        summed = [module for module, claim in self.claims.items() if isinstance(claim.rule, Row | Experts)]
        in_stack = {stack: sum(module.startswith(f"{stack}.") for module in summed) for stack in self.geometry.layers}
        per_layer = {stack: count // self.geometry.layers[stack] for stack, count in in_stack.items()}
        embeds = sum(isinstance(c.rule, Vocab) for c in self.policy.table)
        reduces = in_stack[self.geometry.text_stack] + embeds
        reduced, gathered = reduces * sizes["hidden"] * item, sizes["vocab"] * item
        if self.vision == "data":
            per_layer[self.policy.encoder.stack] = 0  # one gather of the features, whatever the number of layers
        if self.tp_size == 1:
            reduces = reduced = gathered = 0
        return {"per_layer": per_layer, "per_token": reduces + bool(gathered), "per_token_bytes": reduced + gathered,
                "per_token_all_reduce_bytes": reduced, "per_token_gathered_logits_bytes": gathered}


def _length(split: Split, rank: int) -> int:
    start, stop = split.ranges[rank]
    return stop - start


def sizes_in_words(sizes: Sequence[int]) -> str:
    """tp sizes, ascending, as people read them: "1 to 28" where none between is left out; "none" of none."""
    if len(sizes) > 2 and sizes[-1] - sizes[0] == len(sizes) - 1:
        return f"{sizes[0]} to {sizes[-1]}"
    return ", ".join(map(str, sizes)) or "none"


def valid_tp_sizes(policy: Policy, geometry: Geometry) -> list[int]:
    """Every tp_size that violates nothing; none can be above the most heads of any encoder."""
    most = max(a.q_heads for a in geometry.attention.values())
    return [n for n in range(1, most + 1) if not policy.problems(geometry, n)]

