"""The parallel layers: what torch.nn.Linear and Embedding become on one rank of a tensor-parallel group.

Each takes ready tensors (this rank's slices) and the group as a value. Shapes: B batch, S sequence, *_local this
rank's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter.kernels import linear as kernels
from adapter.kernels.linear import Weight
from adapter.parallel.group import Group
from policies.errors import UserError
from policies.rules import Range


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def held(weight: Weight) -> Weight:
    """A weight as a layer holds it: a plain one is a parameter, a quantised one what it is, out of reach of casts."""
    return frozen(weight) if isinstance(weight, Tensor) else weight


class OutOfVocabulary(UserError, IndexError):
    """A token id without an embedding. torch's own embedding raises an IndexError for it."""


def ids_range(ids: Tensor) -> Tensor:
    """The smallest and the largest of token ids, int64 [2]; zeros where there are none."""
    return torch.stack(ids.aminmax()) if ids.numel() else ids.new_zeros(2)


def refuse_unknown(found: Sequence[int], vocab: int, rank: int | None = None) -> None:
    """Raises OutOfVocabulary where one of two token ids, the smallest and the largest, is none of the vocabulary."""
    for token in found:
        if not 0 <= token < vocab:
            where = "" if rank is None else f" in the prompt of rank {rank}"
            raise OutOfVocabulary(f"token id {token}{where}: the model's vocabulary has the ids 0 to {vocab - 1}; use "
                                  "the tokenizer of this checkpoint")


class ColumnParallelLinear(nn.Module):
    """[*, in] -> [*, out_local]: this rank's outputs, no collective.

    slots: positions of this rank's outputs among `width` (policies.heads); the others stay zero. None: no gaps.
    """

    slots: Tensor | None

    def __init__(self, weight: Weight, bias: Tensor | None, slots: Tensor | None = None, width: int = 0) -> None:
        super().__init__()
        self.weight = held(weight)
        self.bias = None if bias is None else frozen(bias)
        self.width = width
        self.register_buffer("slots", slots, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.own(x)
        if self.slots is None:
            return out
        return out.new_zeros(*out.shape[:-1], self.width).index_copy_(-1, self.slots, out)

    def own(self, x: Tensor) -> Tensor:
        """The outputs whose weights are this rank's."""
        return kernels.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """[*, in_local] -> [*, out], summed over the group. Bias is whole on every rank and added once, after the sum."""

    slots: Tensor | None

    def __init__(self, weight: Weight, bias: Tensor | None, tp: Group, slots: Tensor | None = None) -> None:
        super().__init__()
        self.weight = held(weight)
        self.bias = None if bias is None else frozen(bias)
        self.tp = tp
        self.register_buffer("slots", slots, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.slots is not None:
            x = x.index_select(-1, self.slots)
        out = self.tp.all_reduce(self.own(x))
        return out if self.bias is None else out.add_(self.bias)

    def own(self, x: Tensor) -> Tensor:
        """What this rank's inputs add to the sum."""
        return kernels.linear(x, self.weight)


class ParallelExperts(nn.Module):
    """hidden [T, H], of each token the experts that its router chose, int64 [T, k], and their weights [T, k] -> [T, H],
    summed over the group.

    gate_up_proj: [E, 2 x width, H], of each expert the gate's outputs, then the others. down_proj: [E, H, width]. A
    rank has a part of the width of all experts, or the whole width of experts `first` and following.
    """

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor, first: int, activation: nn.Module, tp: Group) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = frozen(gate_up_proj), frozen(down_proj)
        self.first, self.activation, self.tp = first, activation, tp

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return self.tp.all_reduce(self.own(hidden, chosen, weights))

    def own(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """What this rank's weights add to the sum. Only those of chosen experts are read."""
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for expert in chosen.unique().tolist():
            here = expert - self.first
            if not 0 <= here < len(self.gate_up_proj):
                continue
            tokens, which = (chosen == expert).nonzero(as_tuple=True)
            gate, up = kernels.linear(hidden[tokens], self.gate_up_proj[here]).chunk(2, -1)
            mixed = kernels.linear(self.activation(gate) * up, self.down_proj[here])
            out.index_add_(0, tokens, mixed.float() * weights[tokens, which, None].float())
        return out.to(hidden.dtype)


class VocabParallelEmbedding(nn.Module):
    """int64 [B, S] -> [B, S, hidden]: rows `owned` of the vocabulary live here; the sum over the group has them all."""

    def __init__(self, weight: Weight, owned: Range, vocab: int, tp: Group) -> None:
        super().__init__()
        self.weight = held(weight)
        self.owned, self.vocab, self.tp = owned, vocab, tp

    def forward(self, ids: Tensor) -> Tensor:
        """Raises OutOfVocabulary: an id that no rank owns would silently become a zero vector.

        One token at a time on a GPU, which comes from a prompt that was checked, fails there without a synchronisation.
        """
        if ids.device.type == "cpu" or ids.shape[-1] > 1:
            refuse_unknown(ids_range(ids).tolist(), self.vocab)
        elif ids.device.type == "cuda":
            torch._assert_async(((ids >= 0) & (ids < self.vocab)).all())
        return self.look_up(ids)

    def look_up(self, ids: Tensor) -> Tensor:
        """Embeddings [*, hidden] of ids that are known to be of the vocabulary."""
        start, stop = self.owned
        mine = (ids >= start) & (ids < stop)
        rows = (ids - start).masked_fill(~mine, 0)
        out = F.embedding(rows, self.weight) if isinstance(self.weight, Tensor) else self.weight[rows]
        return self.tp.all_reduce(out.masked_fill_(~mine.unsqueeze(-1), 0))


class VocabParallelHead(nn.Module):
    """[*, hidden] -> [*, vocab]: each rank computes its rows' logits, all ranks gather them, in vocabulary order."""

    def __init__(self, weight: Weight, bias: Tensor | None, sizes: tuple[int, ...], tp: Group) -> None:
        super().__init__()
        self.weight = held(weight)
        self.bias = None if bias is None else frozen(bias)
        self.sizes, self.tp = sizes, tp

    def forward(self, x: Tensor) -> Tensor:
        out = kernels.linear(x, self.weight, self.bias)
        return self.tp.all_gather_last(out, self.sizes)


def slot_index(q_slots: tuple[int, ...], rows: int) -> Tensor:
    """Head slots, each `rows` elements wide -> int64 element positions."""
    heads = torch.tensor(q_slots, dtype=torch.int64)
    return (heads[:, None] * rows + torch.arange(rows)).reshape(-1)
