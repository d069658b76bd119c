"""A vision encoder that every rank holds whole (`tensor_parallel.vision`: data, auto), and how it runs.

Data-parallel: this rank's images and frames go through the whole encoder, then one all-gather brings all features to
all ranks, in order. Split (auto only): the same weights compute this rank's heads and its part of the MLP, on views of
them, with the all-reduces of `tensor`. adapter.planning.vision_balance assigns images to ranks and says which mode is
cheaper. A *frame* is an image, or one of the frames of a video.
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
from adapter.model.published import PublishedModules
from adapter.parallel.group import Group
from adapter.planning.plan import Plan
from adapter.planning.vision_balance import Assignment, assign, cost
from policies.errors import UserError
from policies.heads import HeadShard
from policies.policy import Encoder
from policies.rules import Claim, Range, Row, TensorSlice

ALONE = Group(0, 1)  # the group of a rank that computes a module by itself


class EncoderMode:
    """The mode that an encoder computes in now: `split` into this rank's part, or whole.

    The switchable layers read it; the head numbers of the attention modules are set whenever it changes.
    """

    def __init__(self, modules: PublishedModules, plan: Plan, rank: int) -> None:
        self.split = True  # `inject` gives every attention this rank's own heads
        self._modules, self._plan = modules, plan
        encoder = plan.policy.encoder.heads
        self._heads: dict[bool, dict[str, HeadShard]] = {
            True: {encoder: plan.divided.heads[encoder][rank]}, False: {encoder: plan.alone.heads[encoder][0]}}

    def set(self, split: bool) -> None:
        if split != self.split:
            override_heads(self._modules, self._plan, self._heads[split])
            self.split = split


class SwitchableColumn(layers.ColumnParallelLinear):
    """The whole linear layer, or, while `mode` is split, the outputs `ranges` of it."""

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, ranges: tuple[Range, ...], mode: EncoderMode,
                 slots: Tensor | None, width: int) -> None:
        super().__init__(weight, bias, slots, width)
        self.ranges, self.mode = ranges, mode

    def own(self, x: Tensor) -> Tensor:
        outs = [kernels.linear(x, self.weight[a:b], None if self.bias is None else self.bias[a:b])
                for a, b in self.ranges]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.mode.split else kernels.linear(x, self.weight, self.bias)


class SwitchableRow(layers.RowParallelLinear):
    """The whole linear layer, or, while `mode` is split, its inputs `owned`, summed over the ranks."""

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, tp: Group, owned: Range, mode: EncoderMode,
                 slots: Tensor | None) -> None:
        super().__init__(weight, bias, tp, slots)
        self.owned, self.mode = owned, mode

    def own(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight[:, slice(*self.owned)])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.mode.split else kernels.linear(x, self.weight, self.bias)


def switchable(claim: Claim, part: TensorSlice, tp: Group, weight: Tensor, bias: Tensor | None, mode: EncoderMode,
           slots: tuple[Tensor | None, int]) -> nn.Module:
    """Build a layer of a whole encoder. part: the slice of `weight` that this rank computes with in split mode."""
    if isinstance(claim.rule, Row):
        owned, = part.ranges
        return SwitchableRow(weight, bias, tp, owned, mode, slots[0])
    return SwitchableColumn(weight, bias, part.ranges, mode, *slots)


class VisionDataParallel:
    """The forward of an encoder that is whole on every rank, in place of the module's own, which it calls."""

    def __init__(self, module: nn.Module, plan: Plan, tp: Group, mode: EncoderMode) -> None:
        self.forward, self.plan, self.tp, self.mode = module.forward, plan, tp, mode
        self.encoder, self.merge = plan.policy.encoder, plan.geometry.merge_side
        self.cost = cost(plan, next(module.parameters()).element_size())
        self._signature = inspect.signature(self.forward)
        self._empty: Any = None  # an output without features: what a rank without a share has

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        patches, grid, others = self.bound(args, kwargs)
        assignment = self.decide(grid)
        if assignment is None:
            return self.run(True, patches, grid, others)
        return self.by_share(assignment, patches, grid, others)

    def by_share(self, assignment: Assignment, patches: Tensor, grid: Tensor, others: Mapping[str, Any]) -> Any:
        """The features of all frames, each read by one rank."""
        _refuse_tensors(others, self.encoder.module)
        if assignment.shares[self.tp.rank]:
            out = self.run(False, *self.read(assignment, patches, grid), others)
        else:
            out = self._nothing(patches, grid)
        return self._like(out, self.gather(assignment, self.features(out)))

    def bound(self, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """(patches [n, values], grid int64 [media, 3], other arguments) of a call."""
        call = self._signature.bind(*args, **kwargs).arguments
        call |= call.pop("kwargs", {})
        return call.pop(self.encoder.patches), call.pop(self.encoder.grid), call

    def decide(self, grid: Tensor) -> Assignment | None:
        """Assign the frames of a call to ranks; None where all ranks read everything, the encoder split.

        Every rank decides alike.
        """
        assignment = assign(grid.tolist(), self.tp.size)
        return assignment if self.plan.vision == "data" or self.cost.prefers_data(assignment) else None

    def run(self, split: bool, patches: Tensor, grid: Tensor, others: Mapping[str, Any]) -> Any:
        """Run the module's own forward, split or whole."""
        self.mode.set(split)
        return self.forward(**{self.encoder.patches: patches, self.encoder.grid: grid}, **others)

    def read(self, assignment: Assignment, patches: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's share of a call: its patches, and a row of the grid for each of its frames."""
        share, frames = assignment.shares[self.tp.rank], patches.split(assignment.sizes)
        return torch.cat([frames[i] for i in share]), grid.new_tensor([[1, *assignment.frames[i]] for i in share])

    def gather(self, assignment: Assignment, features: Tensor) -> Tensor:
        """[tokens of this rank, n] -> [tokens, n] in the order of the frames: the one collective of a call."""
        width = self.plan.geometry.sizes[self.encoder.width] * (1 + self.plan.geometry.injected_layers)
        tokens = [n // self.merge ** 2 for n in assignment.sizes]
        of_ranks = tuple(width * assignment.patches(r) // self.merge ** 2 for r in range(self.tp.size))
        every = self.tp.all_gather_last(features.reshape(-1), of_ranks)
        came = [i for share in assignment.shares for i in share]
        by_piece = dict(zip(came, every.view(-1, width).split([tokens[i] for i in came]), strict=True))
        return torch.cat([by_piece[i] for i in range(len(tokens))])

    def features(self, out: Any) -> Tensor:
        """The features [tokens, n] in an output: those that stand for tokens and those that are injected, in a row."""
        return features_of(self.encoder, out)

    def _like(self, out: Any, features: Tensor) -> Any:
        """An output like `out` with nothing in it but `features`: hidden states are this rank's alone."""
        first, *injected = (t.contiguous() for t in features.chunk(1 + self.plan.geometry.injected_layers, -1))
        if isinstance(out, Tensor):
            return first
        if isinstance(out, tuple):
            return first, injected
        more = {self.encoder.injected: injected} if self.encoder.injected else {}
        return type(out)(**{self.encoder.features: first}, **more)

    def _nothing(self, patches: Tensor, grid: Tensor) -> Any:
        """An output of the encoder's own type and dtype without features, made once from an output for one token."""
        if self._empty is None:
            token = patches.new_zeros(self.merge ** 2, patches.shape[1])
            out = self.run(False, token, grid.new_tensor([[1, self.merge, self.merge]]), {})
            self._empty = self._like(out, self.features(out)[:0])
        return self._empty


def features_of(encoder: Encoder, out: Any) -> Tensor:
    """The features [tokens, width], or [tokens, n x width] with injected ones, in an output of any release: a tensor, a
    pair of it and the list of injected ones (before release 5), or a structure with fields for both."""
    if isinstance(out, Tensor):
        return out
    if isinstance(out, tuple):
        return torch.cat([out[0], *out[1]], -1)
    first, injected = getattr(out, encoder.features), getattr(out, encoder.injected) if encoder.injected else ()
    return torch.cat([first, *injected], -1)


def _refuse_tensors(others: Mapping[str, Any], encoder: str) -> None:
    """Refuse positions or lengths that a caller computed ahead: they are for all frames, and a rank reads some."""
    if stray := [name for name, value in others.items() if isinstance(value, Tensor)]:
        raise UserError(f"{encoder} got {', '.join(stray)} beside images and their grid: leave them out, or set "
                        "tensor_parallel.vision: tensor")


def install(modules: PublishedModules, plan: Plan, tp: Group, mode: EncoderMode) -> None:
    """Make the encoder of an injected model run as `plan.vision` says."""
    module = encoder_of(modules.model, plan)
    mode.set(False)
    parallel = VisionDataParallel(module, plan, tp, mode)
    module.data_parallel = parallel  # type: ignore[assignment]
    module.forward = parallel


def encoder_of(model: nn.Module, plan: Plan) -> nn.Module:
    """The vision encoder, found by its stack of layers: `renames` are of what is below a module, not of itself."""
    encoder = plan.policy.encoder
    stack = PublishedModules(model, plan.policy).names[encoder.stack]
    return model.get_submodule(stack.removesuffix(encoder.stack.removeprefix(encoder.module)))


def data_parallel_of(model: nn.Module, plan: Plan) -> VisionDataParallel | None:
    """The forward of `model`'s encoder, where that is whole on every rank."""
    return getattr(encoder_of(model, plan), "data_parallel", None)
