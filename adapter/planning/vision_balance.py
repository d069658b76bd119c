"""The arithmetic of `tensor_parallel.vision`: who reads which picture, and what that costs. Imports neither torch nor
DeepSpeed.

    tensor   heads and MLP of the encoder are split over the ranks: 2 all-reduces a layer
    data     every rank holds the whole encoder and reads whole pictures and frames: one gather of the features
    auto     whole as in `data`; each call of the encoder takes the cheaper way

A *piece* is a picture, or one frame of a film: nothing in a encoder looks from one piece at another.

The cost is in floating-point operations of the rank that the others wait for. A byte that a rank sends counts as
FLOPS_PER_BYTE of them, each all-reduce sending 2 (n - 1) / n of its size over n ranks, each gather (n - 1) / n, as the
ring algorithms do (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). Attention costs what it does
where it is computed piece by piece (Transformers 5.23); 4.49 masks one attention over all pieces of a call, which makes
`data` cheaper there than is said here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from policies.rules import Claim, Row

if TYPE_CHECKING:
    from adapter.planning.plan import Plan

FLOPS_PER_BYTE = 100.0  # two CPU ranks: 400 GFLOP/s of bfloat16 a core, 3.8 GB/s through the shared-memory all-reduce


@dataclass(frozen=True)
class Assignment:
    """pieces: (height, width) of each in patches, in order; shares: the pieces of each rank, by number, ascending."""

    pieces: tuple[tuple[int, int], ...]
    shares: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Patches of each piece."""
        return tuple(h * w for h, w in self.pieces)

    def patches(self, rank: int) -> int:
        return sum(self.sizes[i] for i in self.shares[rank])


def pieces(grid: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """(t, h, w) of each picture (t = 1) or film, in patches -> (h, w) of every piece, in order."""
    return tuple((h, w) for t, h, w in grid for _ in range(t))


def deal(grid: Sequence[Sequence[int]], ranks: int) -> Assignment:
    """Longest processing time first: the largest piece left goes to the rank with the fewest patches, the first of
    those. Its fullest rank has at most 4/3 - 1/(3 ranks) times the patches that it must have in the best deal (Graham,
    "Bounds on multiprocessing timing anomalies", SIAM J. Appl. Math. 17(2), 1969)."""
    found = pieces(grid)
    sizes = [h * w for h, w in found]
    load, shares = [0] * ranks, [list[int]() for _ in range(ranks)]
    for piece in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        load[rank] += sizes[piece]
        shares[rank].append(piece)
    return Assignment(found, tuple(tuple(sorted(share)) for share in shares))


@dataclass(frozen=True)
class Work:
    """FLOPs of one rank: `patch` for each patch (linear layers), `pair` for each pair of patches of a piece (scores,
    and their product with the values)."""

    patch: float
    pair: float

    def of(self, sizes: Sequence[int]) -> float:
        return sum(self.patch * n + self.pair * n * n for n in sizes)


@dataclass(frozen=True)
class Cost:
    """whole: the encoder on one rank; parts: each rank's part of it. reduced, gathered: bytes a rank sends for each
    patch of a call, in the all-reduces of a split encoder, in the gather of a dealt one."""

    whole: Work
    parts: tuple[Work, ...]
    reduced: float
    gathered: float

    def tensor(self, sizes: Sequence[int]) -> float:
        """Pieces of these sizes, the encoder split."""
        return max(part.of(sizes) for part in self.parts) + FLOPS_PER_BYTE * self.reduced * sum(sizes)

    def data(self, dealt: Assignment) -> float:
        slowest = max(self.whole.of([dealt.sizes[i] for i in share]) for share in dealt.shares)
        return slowest + FLOPS_PER_BYTE * self.gathered * sum(dealt.sizes)

    def deals(self, dealt: Assignment) -> bool:
        """Whether dealing is the cheaper way. A single piece is never one rank's work."""
        return len(dealt.pieces) > 1 and self.data(dealt) < self.tensor(dealt.sizes)


def cost(plan: Plan, item: int) -> Cost:
    """Of the plan's encoder, `item` bytes a value."""
    n, merge, sizes = plan.tp_size, plan.geometry.picture[1] ** 2, plan.geometry.sizes
    reduced = sum(sizes[c.weight[0]] * times for c, times in _rows(plan) if isinstance(c.rule, Row))
    return Cost(_work(plan.alone, 0), tuple(_work(plan.divided, r) for r in range(n)),
                item * reduced * 2 * (n - 1) / n, item * sizes[plan.policy.encoder.width] / merge * (n - 1) / n)


def _rows(plan: Plan) -> Iterator[tuple[Claim, float]]:
    """(row of the table, how many times it runs for each patch) of the encoder."""
    encoder = plan.policy.encoder
    for claim in plan.policy.table:
        if plan.in_encoder(claim.module):
            layers = plan.geometry.layers[encoder.stack] if "*" in claim.module else 1
            yield claim, layers / (plan.geometry.picture[1] ** 2 if claim.module in encoder.merged else 1)


def _work(plan: Plan, rank: int) -> Work:
    encoder = plan.policy.encoder
    linear = sum(2 * times * math.prod(plan.slice(c.module.replace("*", "0"), "weight", rank).local_shape)
                 for c, times in _rows(plan) if len(c.weight) > 1)
    heads = plan.heads[encoder.heads][rank]
    return Work(linear, 4 * plan.geometry.layers[encoder.stack] * heads.owned * heads.head_dim)


EXAMPLES = {"1 picture of 1024 patches": [[1, 32, 32]], "2 pictures of 1024": [[1, 32, 32]] * 2,
            "8 pictures of 1024": [[1, 32, 32]] * 8, "pictures of 1024 and 512": [[1, 32, 32], [1, 16, 32]],
            "a film of 16 frames of 256": [[16, 16, 16]]}
