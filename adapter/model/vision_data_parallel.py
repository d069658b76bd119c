"""A encoder that every rank holds whole (`tensor_parallel.vision`: data, auto), and how it runs.

VisionDataParallel: this rank's pictures and frames go through the whole encoder, then one gather brings all features
to all ranks, in order. Split (auto only): the same weights compute this rank's heads and part of the MLP, on views of
them, and the sums go over the ranks as in `tensor`. Which pieces a rank reads and which way is cheaper:
adapter.planning.vision_balance.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapter.kernels import linear as kernels
from adapter.model import layers
from adapter.model.attention import override_heads
from adapter.parallel.group import Group
from adapter.planning.plan import Plan
from adapter.planning.vision_balance import Assignment, cost, deal
from policies.errors import UserError
from policies.heads import HeadShard
from policies.rules import Claim, Range, Row, TensorSlice

ALONE = Group(0, 1)  # who computes a whole module


class EncoderMode:
    """How a whole encoder computes now: `split` into this rank's part, or whole. Its attention must be told, too."""

    def __init__(self, modules: Mapping[str, nn.Module], plan: Plan, rank: int) -> None:
        """modules: published name -> module, of the encoder's attention at least."""
        self.split = True  # `inject` tells every attention this rank's own heads
        self._modules, self._plan = dict(modules), plan
        encoder = plan.policy.encoder.heads
        self._heads: dict[bool, dict[str, HeadShard]] = {
            True: {encoder: plan.divided.heads[encoder][rank]}, False: {encoder: plan.alone.heads[encoder][0]}}

    def turn(self, split: bool) -> None:
        if split != self.split:
            override_heads(self._modules, self._plan, self._heads[split])
            self.split = split


class SwitchableColumn(layers.ColumnParallelLinear):
    """The whole linear layer, or, while the switch says so, the outputs `ranges` of it."""

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, ranges: tuple[Range, ...], switch: EncoderMode,
                 slots: Tensor | None, width: int) -> None:
        super().__init__(weight, bias, slots, width)
        self.ranges, self.switch = ranges, switch

    def own(self, x: Tensor) -> Tensor:
        outs = [kernels.linear(x, self.weight[a:b], None if self.bias is None else self.bias[a:b])
                for a, b in self.ranges]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.switch.split else kernels.linear(x, self.weight, self.bias)


class SwitchableRow(layers.RowParallelLinear):
    """The whole linear layer, or, while the switch says so, its inputs `owned`, summed over the ranks."""

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, tp: Group, owned: Range, switch: EncoderMode,
                 slots: Tensor | None) -> None:
        super().__init__(weight, bias, tp, slots)
        self.owned, self.switch = owned, switch

    def own(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight[:, slice(*self.owned)])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.switch.split else kernels.linear(x, self.weight, self.bias)


def either(claim: Claim, part: TensorSlice, tp: Group, weight: Tensor, bias: Tensor | None, switch: EncoderMode,
           slots: tuple[Tensor | None, int]) -> nn.Module:
    """A layer of a whole encoder. part: what is this rank's of `weight` while the encoder is split."""
    if isinstance(claim.rule, Row):
        owned, = part.ranges
        return SwitchableRow(weight, bias, tp, owned, switch, slots[0])
    return SwitchableColumn(weight, bias, part.ranges, switch, *slots)


class VisionDataParallel:
    """The forward of a whole encoder, in place of the module's own, which it calls."""

    def __init__(self, module: nn.Module, plan: Plan, tp: Group, switch: EncoderMode) -> None:
        self.forward, self.plan, self.tp, self.switch = module.forward, plan, tp, switch
        self.encoder, self.merge = plan.policy.encoder, plan.geometry.picture[1]
        self.cost = cost(plan, next(module.parameters()).element_size())
        self._signature = inspect.signature(self.forward)
        self._empty: Any = None  # an output without features: what a rank without a share has

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        patches, grid, others = self.bound(args, kwargs)
        dealt = self.decide(grid)
        if dealt is None:
            return self.run(True, patches, grid, others)
        return self.by_share(dealt, patches, grid, others)

    def by_share(self, dealt: Assignment, patches: Tensor, grid: Tensor, others: Mapping[str, Any]) -> Any:
        """The features of all pieces, each read by one rank."""
        _refuse_tensors(others, self.encoder.module)
        share = dealt.shares[self.tp.rank]
        out = self.run(False, *self.read(dealt, patches, grid), others) if share else self._nothing(patches, grid)
        return self._like(out, self.gather(dealt, self.features(out)))

    def bound(self, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """(patches [n, values], grid int64 [media, 3], other arguments) of a call."""
        call = self._signature.bind(*args, **kwargs).arguments
        call |= call.pop("kwargs", {})
        return call.pop(self.encoder.patches), call.pop(self.encoder.grid), call

    def decide(self, grid: Tensor) -> Assignment | None:
        """Who reads what; None where all ranks read everything, the encoder split. The same on every rank."""
        dealt = deal(grid.tolist(), self.tp.size)
        return dealt if self.plan.vision == "data" or self.cost.deals(dealt) else None

    def run(self, split: bool, patches: Tensor, grid: Tensor, others: Mapping[str, Any]) -> Any:
        """The module's own forward, whole or split."""
        self.switch.turn(split)
        return self.forward(**{self.encoder.patches: patches, self.encoder.grid: grid}, **others)

    def read(self, dealt: Assignment, patches: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's share of a call: its patches and its grid, a row for each piece."""
        share, pieces = dealt.shares[self.tp.rank], patches.split(dealt.sizes)
        return torch.cat([pieces[i] for i in share]), grid.new_tensor([[1, *dealt.pieces[i]] for i in share])

    def gather(self, dealt: Assignment, features: Tensor) -> Tensor:
        """[tokens of this rank, width] -> [tokens, width] in the order of the pieces: the one collective of a call."""
        width, tokens = self.plan.geometry.sizes[self.encoder.width], [n // self.merge ** 2 for n in dealt.sizes]
        every = self.tp.all_gather_last(features.reshape(-1), tuple(
            width * dealt.patches(r) // self.merge ** 2 for r in range(self.tp.size)))
        came = [i for share in dealt.shares for i in share]
        by_piece = dict(zip(came, every.view(-1, width).split([tokens[i] for i in came]), strict=True))
        return torch.cat([by_piece[i] for i in range(len(tokens))])

    def features(self, out: Any) -> Tensor:
        """The features in what some release's encoder returns: [tokens, width]."""
        found: Tensor = out if isinstance(out, Tensor) else getattr(out, self.encoder.features)
        return found

    def _like(self, out: Any, features: Tensor) -> Any:
        """What the encoder returns, with nothing in it but the features: hidden states are this rank's alone."""
        return features if isinstance(out, Tensor) else type(out)(**{self.encoder.features: features})

    def _nothing(self, patches: Tensor, grid: Tensor) -> Any:
        """An output of the encoder's own kind and dtype without features. Which that is, is seen once, on one token."""
        if self._empty is None:
            token = patches.new_zeros(self.merge ** 2, patches.shape[1])
            out = self.run(False, token, grid.new_tensor([[1, self.merge, self.merge]]), {})
            self._empty = self._like(out, self.features(out)[:0])
        return self._empty


def _refuse_tensors(others: Mapping[str, Any], encoder: str) -> None:
    """Positions or lengths that a caller computed ahead are those of all pieces, and a rank reads some."""
    if stray := [name for name, value in others.items() if isinstance(value, Tensor)]:
        raise UserError(f"{encoder} got {', '.join(stray)} beside pictures and their grid: leave them out, or set "
                        "tensor_parallel.vision: tensor")


def attention_switch(model: nn.Module, plan: Plan, rank: int) -> EncoderMode:
    return EncoderMode({plan.policy.published(name): module for name, module in model.named_modules()
                   if plan.in_encoder(plan.policy.published(name))}, plan, rank)


def install(model: nn.Module, plan: Plan, tp: Group, switch: EncoderMode) -> None:
    """Make the encoder of an injected model run as `plan.vision` says."""
    module = encoder_of(model, plan)
    switch.turn(False)
    dealt = VisionDataParallel(module, plan, tp, switch)
    module.dealt = dealt  # type: ignore[assignment]
    module.forward = dealt


def encoder_of(model: nn.Module, plan: Plan) -> nn.Module:
    real = {plan.policy.published(name): name for name, _ in model.named_modules()}
    encoder = plan.policy.encoder
    return model.get_submodule(real[encoder.stack].removesuffix(encoder.stack.removeprefix(encoder.module)))


def data_parallel_of(model: nn.Module, plan: Plan) -> VisionDataParallel | None:
    """How the encoder of `model` runs, where it is whole on every rank."""
    return getattr(encoder_of(model, plan), "dealt", None)
