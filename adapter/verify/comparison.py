"""One comparison of a sharded run with one process: what was compared, how far apart both are, and on which ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from policies.rules import TensorSlice

Limit = Callable[[], Tensor]  # computes how far each element of an output may be off: float32, shaped like the output


@dataclass(frozen=True)
class Comparison:
    """The outcome of one comparison.

    order: when the module ran, among all that were observed. module: its published name, "" for the whole model.
    what: the part of it that was compared, in words. share: the largest |difference| / bound of all elements; above 1
    the module is wrong. error, bound: those of the same element. ranks: those that computed it, or whose copy differs.
    """

    order: float
    module: str
    what: str
    share: float
    error: float = 0.0
    bound: float = 0.0
    ranks: tuple[int, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether rounding explains the difference; False where `share` is NaN."""
        return self.share <= 1


@dataclass(frozen=True)
class Expected:
    """Values that an oracle states for some elements of an output, and how far they may be off; float32 [T, n].

    tokens: the rows of the output, flattened to [T, out], that they are for. columns: int64 [n], the columns that they
    are for; None for all.
    """

    tokens: slice
    columns: Tensor | None
    values: Tensor
    bound: Tensor


def compare_trees(order: float, module: str, what: str, ours: Any, theirs: Any, limit: Limit | None) -> Comparison:
    """Compare every tensor in two nested containers. Without `limit` they must be the same bits."""
    a, b = list(tensors_in(ours)), list(tensors_in(theirs))
    if [t.shape for t in a] != [t.shape for t in b]:
        shapes = f"{what} has shapes {[list(t.shape) for t in a]}, one process's {[list(t.shape) for t in b]}"
        return Comparison(order, module, shapes, torch.inf)
    worst = Comparison(order, module, what, 0.0)
    for mine, one in zip(a, b, strict=True):
        if not torch.equal(mine, one):
            bound = limit() if limit else torch.zeros(one.shape)
            share, error, at_most, _ = furthest(mine, one, bound.to(one.device))
            worst = max(worst, Comparison(order, module, what, share, error, at_most), key=lambda c: c.share)
    return worst


def furthest(ours: Tensor, values: Tensor, bound: Tensor) -> tuple[float, float, float, tuple[int, ...]]:
    """Return (share, error, bound, index) of the element whose |difference| is the largest share of its bound.

    A NaN on one side only is infinitely far. Two tensors without elements are equal.
    """
    if not ours.numel():
        return 0.0, 0.0, 0.0, ()
    a, b = ours.float(), values.float()
    same = (a == b) | (a.isnan() & b.isnan())
    if ours.dtype is torch.float16:  # one process cannot hold a number above its range either
        same |= a.isinf() & (a.sign() == b.sign()) & (b.abs() + bound >= torch.finfo(torch.float16).max)
    error = (a - b).abs().masked_fill(same, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    share = torch.where(same, 0.0, error / bound).nan_to_num(nan=torch.inf, posinf=torch.inf)
    at = int(share.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), share.shape))
    return float(share.flatten()[at]), float(error.flatten()[at]), float(bound.flatten()[at]), index


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested tuples, lists and mappings (Transformers' ModelOutput is one), in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from tensors_in(value)


def with_own_containers(tree: Any) -> Any:
    """Copy the containers and keep the tensors: Transformers changes outputs in place after a module returned them."""
    if isinstance(tree, Mapping):
        clone = copy.copy(tree)
        for key, value in tree.items():
            clone[key] = with_own_containers(value)  # type: ignore[index]
        return clone
    return type(tree)(map(with_own_containers, tree)) if type(tree) in (tuple, list) else tree


def put(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a module parameters in the dtype of those that it has, by their names in the table; returns the latter."""
    before = dict[str, Tensor]()
    for suffix, tensor in weights.items():
        inside, _, name = suffix.rpartition(".")
        held: dict[str, Any] = module.get_submodule(inside)._parameters
        before[suffix] = held[name]
        held[name] = nn.Parameter(tensor.to(held[name].dtype), False)
    return before


@contextmanager
def holding(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the module has these parameters."""
    before = put(module, weights)
    try:
        yield
    finally:
        put(module, before)


def take(t: Tensor, part: TensorSlice) -> Tensor:
    """The ranges of a slice, along the last dimension of t."""
    return torch.cat([t[..., a:b] for a, b in part.ranges], -1)
