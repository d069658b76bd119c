"""Which heads, KV heads and grains each rank owns, for every tp_size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.errors import UserError
from policies.heads import split_grains, split_heads

PUBLISHED = [(28, 4), (12, 2), (64, 8), (16, 16)]  # query and KV heads: 7B, 2B, 72B, every vision encoder
SPLITS = [(q, kv, tp) for q, kv in PUBLISHED for tp in range(1, q + 1)] + [(16, 16, tp) for tp in range(17, 29)]
every_split = pytest.mark.parametrize(("q_heads", "kv_heads", "tp"), SPLITS)
any_split = given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 40))  # KV heads, query heads to each, tp


def check_owners(q_heads: int, tp: int, shards) -> None:
    """Every head once, in order; no rank above ceil(heads / tp); none idle while there are heads enough."""
    assert len(shards) == tp
    assert [h for s in shards for h in range(*s.q)] == list(range(q_heads))
    assert max(s.owned for s in shards) == -(-q_heads // tp)
    assert tp > q_heads or min(s.owned for s in shards) > 0


def check_kv(group: int, shards) -> None:
    for s in shards:
        assert list(range(*s.kv)) == sorted({h // group for h in range(*s.q)})
        assert s.kv_heads == max(1, s.kv[1] - s.kv[0])
        assert s.padded_kv == (s.owned == 0)


def check_slots(group: int, shards) -> None:
    """Attention repeats each KV head `groups` times; every owned head must then meet its own KV head of the whole."""
    for s in shards:
        repeated = np.repeat(np.arange(*s.kv) if s.owned else [-1], s.groups)  # what repeat_kv makes of the local ones
        assert len(repeated) == s.slots == s.kv_heads * s.groups
        assert s.width == s.slots * s.head_dim
        assert len(set(s.q_slots)) == len(s.q_slots) == s.owned
        assert [repeated[slot] for slot in s.q_slots] == [h // group for h in range(*s.q)]
        assert [slot // s.groups for slot in s.q_slots] == [h // group - s.kv[0] for h in range(*s.q)]
        assert s.padded_q == (list(s.q_slots) != list(range(s.slots)))


@every_split
def test_every_head_has_one_owner(q_heads, kv_heads, tp):
    check_owners(q_heads, tp, split_heads(q_heads, kv_heads, 8, tp))


@every_split
def test_a_rank_holds_exactly_the_kv_heads_its_heads_read(q_heads, kv_heads, tp):
    check_kv(q_heads // kv_heads, split_heads(q_heads, kv_heads, 8, tp))


@every_split
def test_slots_keep_the_true_mapping_of_heads_to_kv_heads(q_heads, kv_heads, tp):
    check_slots(q_heads // kv_heads, split_heads(q_heads, kv_heads, 8, tp))


@any_split
def test_any_heads_over_any_ranks(kv_heads, group, tp):
    shards = split_heads(kv_heads * group, kv_heads, 16, tp)
    check_owners(kv_heads * group, tp, shards)
    check_kv(group, shards)
    check_slots(group, shards)


@settings(deadline=None)  # brute force: a busy machine is no failure
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6))
def test_no_cut_needs_fewer_kv_heads(kv_heads, group, tp):
    """Against every cut there is, by squared KV heads per rank and then squared query heads."""
    heads = kv_heads * group
    most, least = -(-heads // tp), int(tp <= heads)

    def cost(cut) -> tuple[int, int]:
        ranges = [range(a, b) for a, b in itertools.pairwise(cut)]
        return sum(len({h // group for h in r}) ** 2 for r in ranges), sum(len(r) ** 2 for r in ranges)

    inner = itertools.combinations_with_replacement(range(heads + 1), tp - 1)
    cuts = [c for c in ((0, *i, heads) for i in inner) if all(least <= b - a <= most for a, b in itertools.pairwise(c))]
    shards = split_heads(heads, kv_heads, 8, tp)
    assert cost((0, *(s.q[1] for s in shards))) == min(map(cost, cuts))


@pytest.mark.parametrize(("q_heads", "kv_heads", "tp", "owned", "kv"), [
    (28, 4, 1, [28], [(0, 4)]),
    (28, 4, 2, [14, 14], [(0, 2), (2, 4)]),
    (28, 4, 3, [9, 9, 10], [(0, 2), (1, 3), (2, 4)]),
    (28, 4, 4, [7] * 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
    (28, 4, 5, [5, 5, 6, 6, 6], [(0, 1), (0, 2), (1, 3), (2, 4), (3, 4)]),
    (28, 4, 6, [4, 5, 5, 4, 5, 5], [(0, 1), (0, 2), (1, 2), (2, 3), (2, 4), (3, 4)]),
    (28, 4, 8, [3, 4] * 4, [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (3, 4), (3, 4)]),
    (12, 2, 3, [4, 4, 4], [(0, 1), (0, 2), (1, 2)]),
    (12, 2, 4, [3] * 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
    (64, 8, 8, [8] * 8, [(i, i + 1) for i in range(8)]),
    (64, 8, 16, [4] * 16, [(i // 2, i // 2 + 1) for i in range(16)]),
    (16, 16, 3, [5, 5, 6], [(0, 5), (5, 10), (10, 16)]),
])
def test_known_head_tables(q_heads, kv_heads, tp, owned, kv):
    shards = split_heads(q_heads, kv_heads, 128, tp)
    assert [s.owned for s in shards] == owned
    assert [s.kv for s in shards] == kv


def test_a_rank_across_two_kv_groups_gets_slots():
    """28 heads over 3: the middle rank has heads 9-13 of KV head 1 and 14-17 of KV head 2, so 2 x 5 slots for 9."""
    first, middle, last = split_heads(28, 4, 128, 3)
    assert (first.groups, first.slots, first.q_slots) == (7, 14, tuple(range(9)))
    assert (middle.groups, middle.slots, middle.q_slots) == (5, 10, tuple(range(9)))
    assert (last.groups, last.slots, last.q_slots) == (7, 14, (0, 1, 2, *range(7, 14)))
    assert [s.padded_q for s in split_heads(28, 4, 128, 4)] == [False] * 4


def test_a_rank_without_heads_keeps_one_empty_slot():
    idle = [s for s in split_heads(16, 16, 80, 28) if not s.owned]
    assert len(idle) == 12
    assert {(s.kv_heads, s.groups, s.slots, s.width, s.q_slots) for s in idle} == {(1, 1, 1, 80, ())}
    assert all(s.padded_q and s.padded_kv for s in idle)


@pytest.mark.parametrize("numbers", [
    (28, 5, 8, 2), (4, 8, 8, 2), (0, 1, 8, 2), (4, 0, 8, 2), (4, 4, 0, 2), (4, 4, 8, 0)])
def test_impossible_heads_are_a_user_error_with_the_numbers(numbers):
    with pytest.raises(UserError, match=f"{numbers[0]} query heads cannot share {numbers[1]} KV heads"):
        split_heads(*numbers)


def check_grains(size: int, tp: int) -> None:
    split = split_grains(size, tp)
    widths = [b - a for a, b in split.ranges]
    assert split.size == size
    assert [e for r in split.ranges for e in range(*r)] == list(range(size))
    assert size < tp or min(widths) > 0
    if max(widths) > 1.05 * size / tp:  # only where single elements are already too coarse
        assert max(widths) == -(-size // tp)


@pytest.mark.parametrize("size", [203, 304, 5120, 8960, 18944, 29568, 151936, 152064])
@pytest.mark.parametrize("tp", range(1, 9))
def test_grains_cover_exactly_and_evenly(size, tp):
    check_grains(size, tp)


@given(st.integers(1, 4000), st.integers(1, 64))
def test_any_grains(size, tp):
    check_grains(size, tp)


@pytest.mark.parametrize("tp", range(21, 65))
def test_no_rank_is_left_without_a_grain(tp):
    """One grain fewer than ranks is within 5 % of the mean from 21 ranks on, yet one rank would go empty."""
    check_grains(64 * (tp - 1), tp)


@pytest.mark.parametrize("size", [5120, 8960, 18944, 29568, 151936, 152064])
@pytest.mark.parametrize("tp", range(2, 9))
def test_wide_dimensions_are_cut_at_multiples_of_64(size, tp):
    assert all(a % 64 == 0 for a, _ in split_grains(size, tp).ranges)
