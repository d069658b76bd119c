"""How requests are batched, where answers end, and what limits them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from adapter.config.load import from_dict
from adapter.requests.batching import Limits, _until_end, padded_together
from adapter.requests.processing import Prepared
from adapter.requests.runner import Tally, make_processor, read_ahead, split
from policies.errors import UserError

DEMO = Path(__file__).resolve().parents[2] / "launch" / "demo" / "checkpoint"


def config(**sections):
    prompts = [{"id": str(n), "prompt": "x"} for n in sections.pop("sizes", [1])]
    return from_dict({"model": {"path": str(DEMO)}, "requests": prompts, **sections})


@pytest.mark.parametrize("sizes, expected", [
    ([1, 2, 3], [["1", "2", "3"]]), ([], []), ([1, 95, 2], [["1"], ["95"], ["2"]]),
])
def test_prompts_that_are_padded_together(sizes, expected):
    """In the last case padding 1 and 2 to 95 of 100 would leave them 5 of their 10 new tokens."""
    limits = Limits.of(config(generation={"max_new_tokens": 10}), 100, GenerationConfig())
    items = [Prepared(str(n), {"input_ids": torch.zeros(1, n)}, n) for n in sizes]
    assert [[item.id for item in batch] for batch in padded_together(items, limits)] == expected


@pytest.mark.parametrize("count, size, replicas, expected", [
    (5, 2, 1, [2, 2, 1]), (12, 8, 1, [8, 4]), (12, 8, 2, [6, 6]), (3, 8, 4, [1, 1, 1]), (0, 8, 2, []),
    (100, 8, 2, [8] * 12 + [4]),
])
def test_every_replica_gets_a_batch_where_there_are_enough_requests(count, size, replicas, expected):
    assert [len(batch) for batch in split(list(range(count)), size, replicas)] == expected
    assert [r for batch in split(list(range(count)), size, replicas) for r in batch] == list(range(count))


def test_the_next_item_is_made_while_one_is_used_and_no_more():
    made: list[int] = []

    def items():
        for n in range(4):
            made.append(n)
            yield n

    for n in read_ahead(items()):
        time.sleep(0.05)
        assert made == list(range(min(n + 2, 4)))


def test_an_error_in_the_making_reaches_the_user():
    def items():
        yield 1
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        list(read_ahead(items()))


def test_answer_ends_where_the_context_does():
    limits = Limits.of(config(generation={"max_new_tokens": 50}), 100, GenerationConfig())
    assert limits.for_prompt(20)["max_new_tokens"] == 50
    assert limits.for_prompt(95)["max_new_tokens"] == 5


def test_deepspeeds_output_limit_is_a_limit_here_too():
    for name in ("max_out_tokens", "max_tokens"):
        assert Limits.of(config(deepspeed={name: 64}), 100, GenerationConfig()).context == 64


@pytest.mark.parametrize("section, checkpoint, ends", [
    ({}, [4, 5], (4, 5)), ({}, 4, (4,)), ({"eos_token_id": 9}, [4, 5], (9,)), ({"eos_token_id": [8, 9]}, 4, (8, 9)),
])
def test_ends_are_the_configs_before_the_checkpoints(section, checkpoint, ends):
    assert Limits.of(config(generation=section), 100, GenerationConfig(eos_token_id=checkpoint)).ends == ends


def test_beams_of_config_or_checkpoint_are_not_streamed():
    assert Limits.of(config(), 100, GenerationConfig()).single
    assert not Limits.of(config(), 100, GenerationConfig(num_beams=3)).single
    assert not Limits.of(config(generation={"num_beams": 2}), 100, GenerationConfig()).single


def test_tokens_after_the_end_are_padding():
    assert _until_end([7, 4, 0, 0], (4, 5)) == [7, 4]
    assert _until_end([7, 8], (4,)) == [7, 8]


def test_no_requests_is_reported():
    with pytest.raises(UserError, match="requests"):
        make_processor(from_dict({"model": {"path": str(DEMO)}}), 100)


@pytest.mark.parametrize("tally, code", [(Tally(3, 0, 0), 0), (Tally(2, 0, 1), 1), (Tally(1, 1, 1), 2)])
def test_exit_codes(tally, code):
    assert tally.exit_code == code
