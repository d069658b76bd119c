"""Which query heads, KV heads and grains each rank owns: the one place for this arithmetic.

Every function takes totals and tp_size and returns one entry per rank. Nothing here has to divide evenly:

* Query heads go to ranks in order, at most ceil(heads / tp_size) each, so that no rank is slower than it must be. Among
  all such cuts the one is taken whose ranks hold few KV heads, evenly: a cut at a KV group's edge costs no replica.
* A rank holds every KV head its query heads read, so KV heads are replicated where ranks outnumber them.
* Attention code wants the same number of query heads for each KV head. A rank that straddles two KV groups unevenly (7
  heads of one, 3 of the next) gets *slots*: each of its KV heads serves `groups` query slots, owned heads are placed in
  theirs, the rest stay zero and are dropped before the output projection. Weights and KV cache hold real heads only.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

from policies.errors import UserError
from policies.rules import Range, Split

GRAIN = 64  # elements; matrix kernels of CPUs and GPUs like multiples of this
GRAIN_IMBALANCE = 1.05  # accept at most 5 % more than the mean on the fullest rank, else cut finer


@dataclass(frozen=True)
class HeadShard:
    """One rank's share of one attention: `q` query heads owned and `kv` KV heads held, as [start, stop) of the whole.

    kv_heads, groups, slots and width are what the attention module must believe: `slots` = `kv_heads` x `groups` query
    heads, `width` = slots x head_dim. `q_slots[i]` is where the i-th owned query head sits among the slots.
    """

    q: Range
    kv: Range
    groups: int
    head_dim: int
    q_slots: tuple[int, ...]

    @property
    def owned(self) -> int:
        return self.q[1] - self.q[0]

    @property
    def kv_heads(self) -> int:
        return max(1, self.kv[1] - self.kv[0])  # a rank without heads keeps one all-zero slot: shapes stay valid

    @property
    def slots(self) -> int:
        return self.kv_heads * self.groups

    @property
    def width(self) -> int:
        return self.slots * self.head_dim

    @property
    def padded_q(self) -> bool:
        """Whether query outputs must be placed into slots (else heads and slots are the same thing)."""
        return self.slots != self.owned

    @property
    def padded_kv(self) -> bool:
        return self.kv_heads != self.kv[1] - self.kv[0]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def kv_range(start: int, stop: int, group: int) -> Range:
    """The KV heads that query heads [start, stop) read, `group` query heads to a KV head."""
    return (start // group, ceil_div(stop, group)) if stop > start else (0, 0)


@lru_cache(maxsize=256)
def _boundaries(q_heads: int, group: int, tp_size: int) -> tuple[int, ...]:
    """tp_size + 1 boundaries over query heads, by dynamic programming over (rank, first head).

    Cost to minimise: sum of squared KV heads per rank (few replicas, evenly spread), then sum of squared query heads.
    """
    most = ceil_div(q_heads, tp_size)
    least = 1 if tp_size <= q_heads else 0
    best: dict[int, tuple[tuple[int, int], tuple[int, ...]]] = {0: ((0, 0), (0,))}
    for _ in range(tp_size):
        step: dict[int, tuple[tuple[int, int], tuple[int, ...]]] = {}
        for start, ((kv_cost, q_cost), cut) in best.items():
            for stop in range(start + least, min(start + most, q_heads) + 1):
                first, last = kv_range(start, stop, group)
                option = ((kv_cost + (last - first) ** 2, q_cost + (stop - start) ** 2), (*cut, stop))
                if stop not in step or option[0] < step[stop][0]:
                    step[stop] = option
        best = step
    return best[q_heads][1]


def split_heads(q_heads: int, kv_heads: int, head_dim: int, tp_size: int) -> tuple[HeadShard, ...]:
    """Every rank's heads. Raises UserError where the heads themselves make no sense."""
    if min(q_heads, kv_heads, head_dim, tp_size) < 1 or q_heads % kv_heads:
        raise UserError(f"{q_heads} query heads cannot share {kv_heads} KV heads evenly (head_dim {head_dim}, "
                        f"tp_size {tp_size}); all must be positive and query heads a multiple of KV heads")
    group = q_heads // kv_heads
    cut = _boundaries(q_heads, group, tp_size)
    return tuple(_shard(start, stop, group, head_dim) for start, stop in itertools.pairwise(cut))


def _shard(start: int, stop: int, group: int, head_dim: int) -> HeadShard:
    kv = kv_range(start, stop, group)
    members = [[h for h in range(start, stop) if h // group == k] for k in range(*kv)]
    groups = max((len(m) for m in members), default=1)
    slots = tuple(local * groups + i for local, m in enumerate(members) for i in range(len(m)))
    return HeadShard((start, stop), kv, groups, head_dim, slots)


def split_grains(size: int, tp_size: int) -> Split:
    """Cut `size` elements (an MLP's width, a vocabulary) in kernel-friendly grains, as even as they allow.

    The largest power-of-two grain up to 64 is taken that leaves no rank more than 5 % over the mean, and none empty.
    """
    grain = GRAIN
    while grain > 1 and (_fullest(size, grain, tp_size) > GRAIN_IMBALANCE * size / tp_size
                         or ceil_div(size, grain) < tp_size):
        grain //= 2
    units = ceil_div(size, grain)
    cut = [min(size, grain * (units * r // tp_size)) for r in range(tp_size)] + [size]
    return Split(size, tuple(itertools.pairwise(cut)))


def _fullest(size: int, grain: int, tp_size: int) -> int:
    return min(size, grain * ceil_div(ceil_div(size, grain), tp_size))
