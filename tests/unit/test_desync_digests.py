"""Digests of steps, who disagrees, and what ranks send each other to find it; ranks are threads."""

from __future__ import annotations

import pytest
import torch
from threads import in_ranks

from adapter.checkpoint.digest import digest, unlike
from adapter.config.schema import TensorParallelSection
from adapter.health.desync import FEATURES, IDS, LEAVING, POSITIONS, TOKEN, Desync, StepDigests, message


def test_digest_sees_order_shape_dtype_and_the_last_bit():
    x = torch.arange(6)
    different = [x, x.flip(0), x.view(2, 3), x.int(), x.float(), x.float().bfloat16(), x.float() + 1e-6, None, x[:0]]
    assert len({digest(d) for d in different}) == len(different)
    assert digest(x.float().bfloat16()) == digest(x.float().bfloat16().clone())
    assert digest(x.view(2, 3).t()) == digest(x.view(2, 3).t().contiguous())
    assert digest(torch.arange(6).view(1, 6)[:, -1]) == digest(torch.tensor([5])), "the new token of one row"
    assert digest([x, {"a": x}]) != digest([x, {"b": x}])
    assert digest([x, x]) != digest(x)
    assert -(2**63) <= digest(x) < 2**63


@pytest.mark.parametrize("column, ranks", [
    ([7, 7, 7], ()), ([7, 8, 7], (1,)), ([8, 7, 7], (0,)), ([7, 8], (1,)), ([1, 2, 3], (1, 2)), ([1, 1, 2, 2], (2, 3)),
    ([1, 2, 2, 3], (0, 3)),
])
def test_ranks_unlike_the_majority_and_ties_go_with_rank_0(column, ranks):
    assert unlike(column) == ranks


SAME = [(1, POSITIONS, 1), (1, FEATURES, 2), (1, TOKEN, 3), (2, POSITIONS, 4), (2, TOKEN, 5), (3, IDS, 6)]
LEFT = [*SAME[:4], (2, TOKEN, 9), (2, LEAVING, 1)]


@pytest.mark.parametrize("other, step, what, advice", [
    (LEFT, 2, "sampled token on rank 1, end of generation on rank 1", "same generation arguments"),
    ([SAME[0], (1, FEATURES, 9), *LEFT[2:]], 1, "image features on rank 1", "rank 0's inputs"),
    ([*SAME[:5], (3, IDS, 9)], 3, "input ids on rank 1", "rank 0's inputs"),
    ([*SAME[:2], SAME[1], *SAME[2:]], 1, "image features on rank 1", "rank 0's inputs"),  # twice there
])
def test_the_earliest_step_is_named_and_what_follows_from_it_is_not(other, step, what, advice):
    words = message([SAME, other, SAME])
    assert f"desync at step {step} " in words and f"unlike the other ranks: {what}. Give every rank {advice}" in (
        words.replace("the same", "same"))


def test_every_rank_that_is_unlike_the_others_is_named():
    words = message([SAME, LEFT, SAME, LEFT, SAME])
    assert "sampled token on ranks 1, 3, end of generation on ranks 1, 3." in words


@pytest.mark.parametrize("value", [-1, 1.0, True, "1", 10_001, 10**9])
def test_desync_check_is_a_whole_number_with_a_bound(value):
    assert TensorParallelSection(desync_check=10_000).desync_check == 10_000
    with pytest.raises(ValueError, match="desync_check"):
        TensorParallelSection(desync_check=value)


def generate(digests: StepDigests, steps: int, tokens: list[int]) -> None:
    """What `generate` calls in a run over `steps` steps, whose tokens are given."""
    for step in range(steps):
        digests.before_forward((), {"input_ids": torch.tensor([[step]])})
        digests.add(POSITIONS, torch.tensor([step]))
        digests(torch.tensor([[tokens[step]]]), None)
    digests.leave()


@pytest.mark.parametrize("every", [1, 3, 1000, 10_000])
def test_what_is_sent_does_not_grow_with_the_steps_between_comparisons(every):
    results, sent = in_ranks(3, lambda tp: generate(StepDigests(tp, every), 7, [5] * 7))
    assert results == [None] * 3
    assert set(sent) == {1} and len(sent) == 1 + len(range(0, 7, every)), "one value a rank and comparison"


@pytest.mark.parametrize("every, wrong, step", [(1, 2, 3), (3, 2, 3), (3, 4, 5), (1000, 0, 1), (1000, 6, 7)])
def test_an_unlike_token_is_named_with_its_step(every, wrong, step):
    def rank(tp):
        generate(StepDigests(tp, every), 7, [9 if i == wrong and tp.rank == 1 else 5 for i in range(7)])

    results, sent = in_ranks(3, rank)
    assert all(isinstance(error, Desync) for error in results), results
    assert f"desync at step {step} " in str(results[0]) and ": sampled token on rank 1." in str(results[0])
    assert len(set(map(str, results))) == 1
    assert sent[-1] <= 100 * (2 + 4 * min(every, 7)), "the rows that there are, not a row for each of `every` steps"


@pytest.mark.parametrize("every, steps", [(1, 2), (3, 3), (1000, 2), (10_000, 6)])
def test_a_rank_that_leaves_early_where_the_others_compare_has_fewer_rows_and_is_named(every, steps):
    results, _ = in_ranks(3, lambda tp: generate(StepDigests(tp, every), steps if tp.rank == 1 else 7, [5] * 7))
    assert all(isinstance(error, Desync) for error in results), results
    assert f"desync at step {steps} " in str(results[2]) and "end of generation on rank 1" in str(results[2])
