"""The engine as DeepSpeed users use it: their own call, ours, on loaded models and from YAML; one rank and three."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from launching import launch

WORKER = Path(__file__).with_name("engine_worker.py")
pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module", params=[1, 3], ids=["one_rank", "three_ranks"])
def facts(request, tmp_path_factory) -> dict:
    directory = make_checkpoint(tmp_path_factory.mktemp("engine") / "m")
    launcher = "alone" if request.param == 1 else "fork"
    outcome = launch(request.param, WORKER, str(directory), launcher=launcher)
    assert outcome.code == 0, outcome.err[-5000:]
    row = next(json.loads(line) for line in outcome.out.splitlines() if line.startswith('{"kept_call"'))
    return row | {"tp": request.param}


def test_three_lines_in_a_script_that_keeps_its_call(facts):
    assert facts["kept_call"]
    assert facts["tp"] == 1 or facts["kept_call_share"] < 0.5


def test_engine_is_deepspeeds(facts):
    assert facts["loaded_is_engine"] and facts["dtype"] == "torch.bfloat16"


def test_forward_equals_one_process(facts):
    assert facts["forward"] <= 1e-4


def test_rotary_frequencies_stay_float32_in_a_bfloat16_model(facts):
    """DeepSpeed calls `.bfloat16()` on the whole model, buffers included."""
    assert facts["frequencies"] == ["torch.float32"]


def test_streaming(facts):
    assert facts["streamed"]


def test_prompt_limit_follows_the_model_unless_the_user_set_one(facts):
    assert facts["long_prompt"] == [1, 1502]
    assert facts["section_reaches_deepspeed"] == 1000
    assert "1001" in facts["user_limit"] and "1000" in facts["user_limit"]


def test_token_outside_the_vocabulary_is_an_error(facts):
    assert facts["out_of_vocabulary"]


@pytest.mark.parametrize("key", ["dtype", "tensor_parallel", "replace_with_kernel_inject", "checkpoint"])
def test_keys_the_adapter_owns_are_refused_with_the_alternative(facts, key):
    assert f"deepspeed.{key}" in facts["own_keys"][key] and "use" in facts["own_keys"][key]


@pytest.mark.parametrize("call, word", [
    ("both", "exactly one"), ("neither", "exactly one"), ("not_a_model", ".config"), ("other_family", "bert"),
    ("stray", "max_out_tokens"), ("odd_section", "tp_size"),
])
def test_calls_that_cannot_work(facts, call, word):
    assert word in facts[call]
