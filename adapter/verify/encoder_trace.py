"""The trace of a vision encoder that every rank holds whole and that reads other images on each rank.

While it runs, nothing can be gathered: the ranks run other images, and not equally many. So when it has ended, what
each rank read is run again, one share after the other, by all ranks together. Every module is checked on every share,
all ranks must have the same bits, and the features of the first run must be those of the second, image by image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapter.model.vision_data_parallel import ALONE, VisionDataParallel
from adapter.parallel.group import Group
from adapter.planning.plan import Plan
from adapter.planning.vision_balance import Assignment
from adapter.verify.comparison import compare_trees

if TYPE_CHECKING:
    from adapter.verify.trace import Trace


class EncoderTrace:
    """Checks the encoder of `trace`'s model. modes: how each of its calls ran, "data" or "tensor"."""

    def __init__(self, trace: Trace, encoder: VisionDataParallel) -> None:
        self.trace, self.encoder = trace, encoder
        self.modes: list[str] = []

    def runs(self, module: nn.Module) -> bool:
        """Whether `module` is the encoder."""
        return getattr(module, "data_parallel", None) is self.encoder

    def cut(self, tp: Group) -> tuple[Plan, Group]:
        """How the encoder is cut in the call that is under way, and the ranks that compute it together."""
        plan = self.encoder.plan
        return (plan.divided, tp) if self.encoder.mode.split else (plan.alone, ALONE)

    def compare(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        """The encoder has ended: run every share again and compare."""
        trace, encoder = self.trace, self.encoder
        patches, grid, others = encoder.bound(args, kwargs)
        assignment = encoder.decide(grid)
        self.modes.append("data" if assignment else "tensor")
        frames = [h * w for t, h, w in grid.tolist() for _ in range(t)]  # patches of each
        shares = [list(share) for share in assignment.shares if share] if assignment else [list(range(len(frames)))]
        kept, features = len(trace.kept), list[Tensor]()
        with trace.calls_of(name):  # the second run is none of the caller's calls
            for share in shares:
                part = _part(assignment, share, patches, grid) if assignment else (patches, grid)
                features.append(self._run(name, assignment is None, *part, others))
        trace.order += 1
        merge = encoder.merge ** 2
        tokens = [size // merge for size in frames]
        if trace.skeleton:
            again = _in_order(shares, features, tokens)
            self._compare_features(name, encoder.features(output), again, tokens, assignment)
            trace.kept[kept:] = self._whole(trace.kept[kept:], shares, frames)
        trace.record(name, args, kwargs, output, (args, dict(sorted(kwargs.items()))), output)

    def _run(self, name: str, split: bool, patches: Tensor, grid: Tensor, others: Any) -> Tensor:
        """Run one share on every rank, every module checked -> its features [tokens, width]."""
        names = self.encoder.encoder
        with self.trace.calls_of(name) as calls:
            output = self.encoder.run(split, patches, grid, others)
        arguments = {names.patches: patches, names.grid: grid} | others
        self.trace.compare_around(name, (), arguments, output, calls)
        return self.encoder.features(output)

    def _compare_features(self, name: str, ours: Tensor, again: Tensor, tokens: list[int],
                          assignment: Assignment | None) -> None:
        """Features [tokens, width] of all images as they were returned against those of the second run."""
        found = compare_trees(self.trace.order, name, "features of all images, in their order", ours, again, None)
        if assignment and ours.shape == again.shape and not found.holds:
            wrong = [not torch.equal(a, b) for a, b in zip(ours.split(tokens), again.split(tokens), strict=True)]
            ranks = tuple(r for r, share in enumerate(assignment.shares) if any(wrong[i] for i in share))
            found = replace(found, ranks=ranks)
        self.trace.comparisons.append(found)

    @staticmethod
    def _whole(kept: list[tuple[str, Tensor]], shares: list[list[int]], frames: list[int]) -> list[tuple[str, Tensor]]:
        """Outputs of layers that were kept share by share -> one of all images in order for each layer."""
        layers = dict[str, list[Tensor]]()
        for layer, output in kept:
            layers.setdefault(layer, []).append(output)
        return [(layer, _in_order(shares, outputs, frames)) for layer, outputs in layers.items()]


def _part(assignment: Assignment, share: list[int], patches: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """The patches and the grid of a share, not by the code that is checked."""
    frames = patches.split(assignment.sizes)
    return torch.cat([frames[i] for i in share]), grid.new_tensor([[1, *assignment.frames[i]] for i in share])


def _in_order(shares: list[list[int]], outputs: list[Tensor], sizes: list[int]) -> Tensor:
    """The outputs [rows, n] of each share, `sizes[i]` rows for image i -> one of all images in order."""
    rows = dict[int, Tensor]()
    for share, output in zip(shares, outputs, strict=True):
        rows |= zip(share, output.split([sizes[i] for i in share]), strict=True)
    assert sorted(rows) == list(range(len(sizes))), shares
    return torch.cat([rows[i] for i in range(len(sizes))])
