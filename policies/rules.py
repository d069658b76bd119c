"""The vocabulary of sharding: what a rule does to the tensors of one module, and which slice of each a rank owns.

A rule is pure data. It names the dimension of `weight` that is cut and what becomes of `bias`; the sizes come from a
family's page (`Claim`), the boundaries from `policies.heads` (`Split`), the collectives from `adapter.model.layers`.
Terms are Megatron-LM's: column-parallel cuts a linear layer's outputs, row-parallel its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from policies.errors import UserError

Range = tuple[int, int]


@dataclass(frozen=True)
class Split:
    """Who owns which elements of one dimension: `ranges[rank]` is (start, stop). Ranges may overlap (replicated KV)."""

    size: int
    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class TensorSlice:
    """One rank's part of one tensor: the concatenation of `ranges` along `dim`; `dim` None is the whole tensor."""

    shape: tuple[int, ...]
    dim: int | None = None
    ranges: tuple[Range, ...] = ()

    @property
    def local_shape(self) -> tuple[int, ...]:
        if self.dim is None:
            return self.shape
        length = sum(stop - start for start, stop in self.ranges)
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    @property
    def whole(self) -> TensorSlice:
        """All of the same tensor."""
        return TensorSlice(self.shape)


@dataclass(frozen=True)
class Cut:
    """How one tensor is cut: along `dim`, where the parts that `axes` name lie one after another, each of them divided
    among the ranks by the Split of its own axis."""

    dim: int
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """Base of the vocabulary: `dim` of `weight` is cut by rank, and bias with it if `cuts_bias`."""

    dim = 0
    cuts_bias = True

    def axis(self, weight_dims: tuple[str, ...]) -> str:
        """The named dimension whose Split decides the boundaries."""
        return weight_dims[self.dim]

    def cut(self, suffix: str, tensors: Mapping[str, tuple[str, ...]]) -> Cut | None:
        """How the parameter `suffix` of a module with `tensors`, name -> named dimensions, is cut; None: not at all."""
        if suffix == "bias" and not self.cuts_bias:
            return None
        return Cut(self.dim if suffix == "weight" else 0, (self.axis(tensors["weight"]),))


@dataclass(frozen=True)
class Column(Rule):
    """Linear [out, in] cut by outputs, bias with it. No collective: the next layer takes the shard."""


@dataclass(frozen=True)
class Row(Rule):
    """Linear [out, in] cut by inputs; all-reduce of the output. Bias is whole on every rank, added once, after it."""

    dim = 1
    cuts_bias = False


@dataclass(frozen=True)
class Fused(Rule):
    """Linear whose outputs are several parts one after another, each cut by the axis named for it, weight and bias
    alike. No collective."""

    axes: tuple[str, ...]

    def cut(self, suffix: str, tensors: Mapping[str, tuple[str, ...]]) -> Cut:
        return Cut(0, self.axes)


@dataclass(frozen=True, init=False)
class FusedQKV(Fused):
    """Linear [(q | k | v) x heads x head_dim, in]: each of the three parts is cut by heads, by the same axis."""

    def __init__(self, axis: str) -> None:
        object.__setattr__(self, "axes", (axis,) * 3)


@dataclass(frozen=True)
class InPlace(Rule):
    """Parameters that a module's own forward reads: they stay where Transformers has them, each cut along dimension 0.

    parts: (a tensor's first dimension, the axes of the parts that lie in it); other tensors are one part of that name.
    """

    parts: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def cut(self, suffix: str, tensors: Mapping[str, tuple[str, ...]]) -> Cut:
        first = tensors[suffix][0]
        return Cut(0, dict(self.parts).get(first, (first,)))


@dataclass(frozen=True)
class Vocab(Rule):
    """Embedding [vocab, hidden] cut by rows; ids another rank owns give zero here; all-reduce of the output."""


@dataclass(frozen=True)
class Head(Rule):
    """Output projection [vocab, hidden] cut by rows; the logits of all ranks are gathered."""


@dataclass(frozen=True)
class Replicated(Rule):
    """Every rank holds the whole tensor, for the reason given."""

    why: str

    def cut(self, suffix: str, tensors: Mapping[str, tuple[str, ...]]) -> Cut | None:
        return None


@dataclass(frozen=True)
class PerHead(Replicated):
    """A norm [head_dim] of each head: the weight is whole on every rank, and acts on the heads that the rank owns of
    `part`, a dimension that is cut by heads. A plain Replicated would say that its input is the same on all ranks.
    All inputs of the norm are of those heads."""

    part: str


@dataclass(frozen=True)
class Experts(Rule):
    """The experts of a layer in two tensors of one module: [experts, (gate | up) x width, hidden] and [experts, hidden,
    width]; all-reduce of what a token's experts give. A Row would be one matrix; here a token has its own, by the
    router, and both tensors must be cut alike.

    by: "tensor" cuts each expert as a dense MLP is, "expert" deals whole ones. width: its named dimension.
    """

    width: str
    by: Literal["tensor", "expert"] = "tensor"

    def cut(self, suffix: str, tensors: Mapping[str, tuple[str, ...]]) -> Cut:
        dims = tensors[suffix]
        if self.by == "expert":
            return Cut(0, dims[:1])
        return Cut(2, (self.width,)) if dims[2] == self.width else Cut(1, (self.width, self.width))


@dataclass(frozen=True)
class Claim:
    """One row of a family's table: the parameters of the modules that match `module`, and the rule they follow.

    module: published name; `*` stands for a layer number.
    weight, bias: the named dimensions of each; None where the module has no such parameter.
    kind: the kind of the layers that have such a module (Geometry.kinds); None: all layers.
    others: (name, named dimensions) of parameters with names of their own, in place of weight and bias; "conv1d.weight"
        is that of a module inside.
    transposed: files may hold `others` with their last two dimensions swapped; their shapes tell.
    """

    module: str
    rule: Rule
    weight: tuple[str, ...] = ()
    bias: tuple[str, ...] | None = None
    kind: str | None = None
    others: tuple[tuple[str, tuple[str, ...]], ...] = ()
    transposed: bool = False

    def parameters(self) -> dict[str, tuple[str, ...]]:
        """Suffix ("weight", "bias", or a name of its own) -> named dimensions."""
        if self.others:
            return dict(self.others)
        return {"weight": self.weight} | ({"bias": self.bias} if self.bias is not None else {})

    def axes(self) -> set[str]:
        """The named dimensions that are divided among the ranks."""
        tensors = self.parameters()
        return {axis for suffix in tensors if (cut := self.rule.cut(suffix, tensors)) for axis in cut.axes}


def slice_of(
    claim: Claim, suffix: str, sizes: Mapping[str, int], splits: Mapping[str, Split], rank: int
) -> TensorSlice:
    """The slice of `claim`'s parameter `suffix` that `rank` owns."""
    tensors = claim.parameters()
    shape = tuple(sizes[d] for d in tensors[suffix])
    cut = claim.rule.cut(suffix, tensors)
    if cut is None:
        return TensorSlice(shape)
    ranges, at = [], 0
    for split in (splits[axis] for axis in cut.axes):
        start, stop = split.ranges[rank]
        ranges.append((at + start, at + stop))
        at += split.size
    assert at == shape[cut.dim], (claim.module, cut, shape)
    return TensorSlice(shape, cut.dim, tuple(ranges))


@dataclass(frozen=True)
class HeadNumbers:
    """Attributes that must be true for a shard: module pattern, the entry of Geometry.attention it belongs to, and
    attribute -> HeadShard field, or the axes of which it is the number of elements on the rank. kind: as in Claim."""

    module: str
    encoder: str
    numbers: Mapping[str, str | tuple[str, ...]]
    kind: str | None = None


def expand(pattern: str, layers: Mapping[str, int]) -> list[str]:
    """Every module name a pattern stands for, e.g. model.layers.0.mlp ... model.layers.27.mlp.

    Raises UserError where the number of layers of that stack is unknown.
    """
    if "*" not in pattern:
        return [pattern]
    stack = pattern.split(".*", 1)[0]
    if stack not in layers:
        raise UserError(f"policy row {pattern!r}: no layer count for the stack {stack!r}; known: {sorted(layers)}")
    return [pattern.replace("*", str(i), 1) for i in range(layers[stack])]
