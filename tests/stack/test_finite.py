"""Logits that are no numbers: the request fails, in words, and the others of its batch are answered. This process
becomes a rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import EOS, cases, make_checkpoint
from decoding import SHAPE, TWELVE, lean
from forking import OF_A_RANK
from safetensors.torch import load_file, save_file

import adapter
from adapter.config.load import from_dict
from adapter.generation.loop import DecodeLoop
from adapter.requests.finite import FiniteLogits, NonFiniteLogits, finite_generate
from policies.errors import CheckFailed

ROOT = Path(__file__).resolve().parents[2]
DAMAGED = 77  # a token whose embedding is infinite: only the rows that have it are spoiled
TEXT = {"input_ids": torch.randint(100, 200, (3, 9), generator=torch.Generator().manual_seed(4)),
        "attention_mask": torch.ones(3, 9, dtype=torch.int64)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("finite") / "m", SHAPE, files=1)


@pytest.fixture(scope="module")
def damaged(directory, tmp_path_factory) -> Path:
    """A checkpoint with one infinite row of its embedding."""
    other = make_checkpoint(tmp_path_factory.mktemp("finite") / "damaged", SHAPE, files=1)
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"][DAMAGED] = torch.inf
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return other


def started_from(directory, **parallel):
    return adapter.init_inference(from_dict({"model": {"path": str(directory), "dtype": "float32"},
                                             "tensor_parallel": {"tp_size": 1, **parallel}}, directory))


def with_damage(rows: list[int]) -> dict[str, torch.Tensor]:
    ids = TEXT["input_ids"].clone()
    ids[rows, 4] = DAMAGED
    return TEXT | {"input_ids": ids}


@pytest.fixture(scope="module")
def engine(damaged):
    return started_from(damaged, self_test=False)


@pytest.fixture(scope="module")
def plain(damaged):
    return transformers.Qwen2VLForConditionalGeneration.from_pretrained(damaged, torch_dtype=torch.float32).eval()


@pytest.fixture(params=["ours", "transformers'", "one process"])
def generate(request, engine, plain, monkeypatch):
    """`generate` by each loop."""
    if request.param == "one process":
        return torch.inference_mode()(finite_generate(plain))
    if request.param == "transformers'":
        monkeypatch.setattr(DecodeLoop, "why_not", lambda *_: "asked for")
    return engine.generate


@pytest.mark.parametrize("more", [{}, {"do_sample": True, "top_k": 5}, {"num_return_sequences": 2, "do_sample": True}],
                         ids=["greedy", "sampled", "sequences"])
def test_a_row_that_is_not_finite_fails_and_the_others_are_answered(generate, plain, more):
    with pytest.raises(NonFiniteLogits, match=r"row 1: the logits of token 1 .* not finite in float32") as caught:
        generate(**with_damage([1]), **{**TWELVE, **more}, suppress_tokens=[DAMAGED])
    assert caught.value.rows == {1: 1}
    if not more:
        right = plain.generate(**TEXT, **TWELVE, suppress_tokens=[DAMAGED])
        assert torch.equal(caught.value.output[[0, 2]], right[[0, 2]])


def test_beams_fail_too(generate):
    with pytest.raises(NonFiniteLogits) as caught:
        generate(**with_damage([0, 2]), **{**TWELVE, "num_beams": 3})
    assert caught.value.rows == {0: 1, 2: 1}


def test_a_batch_of_which_no_row_is_finite_ends_at_once(generate):
    with pytest.raises(NonFiniteLogits) as caught:
        generate(**with_damage([0, 1, 2]), **TWELVE, eos_token_id=EOS, pad_token_id=0)
    assert caught.value.output.shape[1] == 10 and caught.value.rows == {0: 1, 1: 1, 2: 1}


def test_the_token_that_could_not_be_chosen_is_named(generate, plain):
    """The damage is met when the answer comes to the token: here, when it is forced to."""
    forced = [lambda ids, scores: torch.full_like(scores, -1e9).index_fill_(
        1, torch.tensor([DAMAGED if ids.shape[1] == 11 else 20]), 0)]
    with pytest.raises(NonFiniteLogits) as caught:
        generate(**TEXT, **TWELVE, logits_processor=transformers.LogitsProcessorList(forced))
    assert caught.value.rows == {0: 4, 1: 4, 2: 4}


def test_what_comes_after_a_rows_end_does_not_matter(generate):
    """A row that has ended is fed padding, and if that is the damaged token nobody cares."""
    first = generate(**TEXT, **TWELVE)[:, 9:]
    ends = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": int(first[0, 2]), "pad_token_id": DAMAGED}
    out = generate(**TEXT, **ends)
    assert (out == DAMAGED).any(), "the case must have a row that ends before another"


def test_options_that_forbid_tokens_are_not_mistaken(generate):
    """They write -infinity, after the model's own logits."""
    generate(**TEXT, **TWELVE, suppress_tokens=[10, 11], bad_words_ids=[[20], [30, 40]])


def test_which_rows_and_tokens():
    finite = FiniteLogits(2)
    for values in ([0.0, 1, 2, 3], [0, torch.nan, 2, 3], [0, -torch.inf, torch.inf, 3]):
        cleaned = finite.clean(torch.tensor(values).repeat(3, 1).T.contiguous())
        assert cleaned.isfinite().all()
    with pytest.raises(NonFiniteLogits) as caught:
        finite.raise_for("output", torch.float16)
    assert caught.value.rows == {0: 2, 1: 3}
    assert "float16; float16 overflows with this family: set model.dtype to bfloat16" in str(caught.value)


def test_the_self_test_refuses_weights_that_are_not_finite(directory, tmp_path):
    """A damaged layer that it does not look into: the last one's down_proj."""
    other = make_checkpoint(tmp_path / "m", SHAPE, files=1)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e38
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match=r"self-test failed .*not finite.*model.layers.1.mlp.down_proj.weight"):
        started_from(other)
    engine = started_from(other, self_test=False)
    with pytest.raises(NonFiniteLogits):
        engine.generate(**cases()["image"], **TWELVE)


def test_the_self_test_refuses_a_forward_that_is_not_finite(tmp_path):
    """Weights that are numbers, after the layers that it looks into, whose products are none."""
    other = make_checkpoint(tmp_path / "m", SHAPE, files=1)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 1e37
    tensors["lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"] *= 1e6
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match=r"not finite.*a forward through model.layers, torch.float32"):
        started_from(other)


@lean
def test_ranks_that_are_compared_fail_alike(damaged):
    """With desync_check the steps are Transformers' own."""
    engine = started_from(damaged, desync_check=1, self_test=False)
    with pytest.raises(NonFiniteLogits):
        engine.generate(**with_damage([1]), **TWELVE)


def test_a_request_that_is_not_finite_is_a_failed_row(tmp_path):
    """All the way through the command, on the demo: the others of its batch are answered, and the exit code is 2."""
    demo = ROOT / "launch" / "demo" / "checkpoint"
    other = tmp_path / "demo"
    other.mkdir()
    for file in demo.iterdir():
        if file.name != "model.safetensors":
            (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(demo / "model.safetensors")
    word = transformers.AutoTokenizer.from_pretrained(demo)("?")["input_ids"][-1]
    name = "model.embed_tokens.weight" if "model.embed_tokens.weight" in tensors else "embed_tokens.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][word] = torch.inf
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({
        "model": {"path": str(other), "dtype": "float32"}, "tensor_parallel": {"tp_size": 1, "self_test": False},
        "generation": {"max_new_tokens": 3, "do_sample": False},
        "requests": [{"id": "sound", "prompt": "What"}, {"id": "spoiled", "prompt": "What?"}]}))
    argv = [sys.executable, "launch/generate.py", "--config", str(config)]
    alone = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}  # the engines above set them
    outcome = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=alone)
    rows = [json.loads(line) for line in outcome.stdout.splitlines() if line.startswith("{")]
    assert outcome.returncode == 2 and len(rows) == 3, outcome.stderr[-3000:]
    assert rows[0]["id"] == "sound" and rows[0]["new_tokens"] > 0
    assert rows[1]["id"] == "spoiled" and "token 1 of the answer are not finite in float32" in rows[1]["error"]
    assert (rows[2]["answered"], rows[2]["failed"]) == (1, 1)
