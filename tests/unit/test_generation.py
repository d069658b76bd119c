"""How requests are batched, where answers end, and what limits them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from adapter.config import from_dict
from adapter.generation import Limits, Tally, _batches, _until_end, make_processor
from adapter.processing import Prepared, RequestError
from policies.errors import UserError

DEMO = Path(__file__).resolve().parents[2] / "launch" / "demo" / "checkpoint"


def config(**sections):
    prompts = [{"id": str(n), "prompt": "x"} for n in sections.pop("sizes", [1])]
    return from_dict({"model": {"path": str(DEMO)}, "requests": prompts, **sections})


class Sized:
    """Prepares a request into as many tokens as its id says; 13 fails."""

    def prepare(self, request):
        if request.id == "13":
            raise RequestError(request.id, "unlucky")
        return Prepared(request.id, {"input_ids": torch.zeros(1, int(request.id))}, int(request.id))


def batches(sizes, new=10, batch=2, context=100):
    c = config(sizes=sizes, generation={"max_new_tokens": new})
    limits = Limits.of(c, context, GenerationConfig())
    return [([p.id for p in good], [e.request_id for e in bad])
            for good, bad in _batches(c.requests, Sized(), batch, limits)]


@pytest.mark.parametrize("sizes, expected", [
    ([1, 2, 3], [(["1", "2"], []), (["3"], [])]),
    ([1, 13, 2], [(["1", "2"], ["13"])]),
    ([13], [([], ["13"])]),
    ([1, 95, 2], [(["1"], []), (["95"], []), (["2"], [])]),
])
def test_batches(sizes, expected):
    """The last case: padding 1 and 2 to 95 of 100 would leave them 5 of their 10 new tokens."""
    assert batches(sizes) == expected


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


def test_no_requests_is_said():
    with pytest.raises(UserError, match="requests"):
        make_processor(from_dict({"model": {"path": str(DEMO)}}), 100)


@pytest.mark.parametrize("tally, code", [(Tally(3, 0, 0), 0), (Tally(2, 0, 1), 1), (Tally(1, 1, 1), 2)])
def test_exit_codes(tally, code):
    assert tally.exit_code == code
