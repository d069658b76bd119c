"""Which rank reads which image under `tensor_parallel.vision`, and what each mode costs. Imports neither torch nor
DeepSpeed.

    tensor   heads and MLP of the encoder are split over the ranks: 2 all-reduces a layer
    data     every rank holds the whole encoder and reads whole frames: one gather of the features
    auto     held whole as in `data`; each call of the encoder takes the cheaper mode

A *frame* here is an image, or what the encoder reads of a video at one time: nothing in an encoder looks from one frame
at another.

The cost is counted in floating-point operations of the rank that the others wait for, by adapter.planning.cost_model. A
byte that a rank sends counts as FLOPS_PER_BYTE of them, each all-reduce sending 2 (n - 1) / n of its size over n ranks,
each gather (n - 1) / n, as the ring algorithms do (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
Attention costs what it does where it is computed frame by frame (Transformers 5.23); 4.49 masks one attention over all
frames of a call, which makes `data` cheaper there than is counted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapter.planning.cost_model import DTYPE_BYTES, Work, Workload, vision_work

if TYPE_CHECKING:
    from adapter.planning.plan import Plan

FLOPS_PER_BYTE = 100.0  # two CPU ranks: 400 GFLOP/s of bfloat16 a core, 3.8 GB/s through the shared-memory all-reduce
EXAMPLES = {"1 image of 1024 patches": [[1, 32, 32]], "2 images of 1024": [[1, 32, 32]] * 2,
            "8 images of 1024": [[1, 32, 32]] * 8, "images of 1024 and 512": [[1, 32, 32], [1, 16, 32]],
            "a video of 16 frames of 256": [[16, 16, 16]]}


@dataclass(frozen=True)
class Assignment:
    """frames: (height, width) of each in patches, in order; shares: the frames of each rank, by number, ascending."""

    frames: tuple[tuple[int, int], ...]
    shares: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Patches of each frame."""
        return tuple(h * w for h, w in self.frames)

    def patches(self, rank: int) -> int:
        return sum(self.sizes[i] for i in self.shares[rank])


def frames_of(grid: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """(t, h, w) of each image (t = 1) or video, in patches -> (h, w) of every frame, in order."""
    return tuple((h, w) for t, h, w in grid for _ in range(t))


def assign(grid: Sequence[Sequence[int]], ranks: int) -> Assignment:
    """Assign frames to ranks by the longest processing time first.

    The largest frame left goes to the rank with the fewest patches, the first of those. The fullest rank has at most
    4/3 - 1/(3 ranks) times the patches that it must have in the best assignment (Graham, "Bounds on multiprocessing
    timing anomalies", SIAM J. Appl. Math. 17(2), 1969).
    """
    frames = frames_of(grid)
    sizes = [h * w for h, w in frames]
    load, shares = [0] * ranks, [list[int]() for _ in range(ranks)]
    for frame in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        load[rank] += sizes[frame]
        shares[rank].append(frame)
    return Assignment(frames, tuple(tuple(sorted(share)) for share in shares))


@dataclass(frozen=True)
class EncoderFlops:
    """FLOPs of one rank: `patch` for each patch (linear layers), `pair` for each pair of patches of a frame
    (attention), `window_pair` for each pair of a window of `window` patches."""

    patch: float
    pair: float
    window_pair: float
    window: int

    def of(self, sizes: Sequence[int]) -> float:
        return sum(self.patch * n + self.pair * n * n + self.window_pair * n * min(n, self.window) for n in sizes)


@dataclass(frozen=True)
class Cost:
    """What an encoder costs in both modes. whole: the encoder on one rank; parts: each rank's part of it. reduced,
    gathered: bytes a rank sends for each patch of a call, in the all-reduces of `tensor`, in the gather of `data`."""

    whole: EncoderFlops
    parts: tuple[EncoderFlops, ...]
    reduced: float
    gathered: float

    def tensor(self, sizes: Sequence[int]) -> float:
        """The cost of frames of these sizes, in patches, where the encoder is split."""
        return max(part.of(sizes) for part in self.parts) + FLOPS_PER_BYTE * self.reduced * sum(sizes)

    def data(self, assignment: Assignment) -> float:
        """The cost where each rank reads its frames with the whole encoder."""
        slowest = max(self.whole.of([assignment.sizes[i] for i in share]) for share in assignment.shares)
        return slowest + FLOPS_PER_BYTE * self.gathered * sum(assignment.sizes)

    def prefers_data(self, assignment: Assignment) -> bool:
        """Whether `data` is the cheaper mode. A single frame is never one rank's work."""
        return len(assignment.frames) > 1 and self.data(assignment) < self.tensor(assignment.sizes)


def cost(plan: Plan, item: int) -> Cost:
    """The cost of the plan's encoder, with `item` bytes a value."""
    n, merged = plan.tp_size, plan.geometry.merge_side ** 2
    sent = _of_one_token(plan.divided, 0).sent_bytes / merged * item / DTYPE_BYTES[plan.dtype]
    gathered = item * plan.geometry.sizes[plan.policy.encoder.width] * (1 + plan.geometry.injected_layers) / merged
    return Cost(_flops(plan.alone, 0), tuple(_flops(plan.divided, rank) for rank in range(n)), sent,
                gathered * (n - 1) / n)


def _of_one_token(plan: Plan, rank: int) -> Work:
    """The work of those patches that become one token."""
    return vision_work(plan, Workload(prompt_tokens=1, patches=(plan.geometry.merge_side ** 2,)), rank)


def _flops(plan: Plan, rank: int) -> EncoderFlops:
    geometry, encoder = plan.geometry, plan.policy.encoder
    shard = plan.heads[encoder.heads][rank]
    pair, windowed = 4 * shard.head_dim * shard.slots, geometry.windowed_layers  # FLOP of a pair in one layer
    return EncoderFlops(_of_one_token(plan, rank).linear_flop / geometry.merge_side ** 2,
                        pair * (geometry.layers[encoder.stack] - windowed), pair * windowed, geometry.window_patches)
