"""The demo: its pictures are drawn the same every time, its checkpoint is a real one and answers right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DEMO = Path(__file__).resolve().parents[2] / "launch" / "demo"
sys.path.insert(0, str(DEMO))

import ask  # noqa: E402
import demo_set  # noqa: E402
import pictures  # noqa: E402

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def asker() -> ask.Asker:
    return ask.Asker.load()


@pytest.mark.parametrize("kind", pictures.KINDS)
def test_a_seed_draws_the_same_item(kind: str) -> None:
    one, two = (pictures.draw(np.random.default_rng(5), kind) for _ in range(2))
    assert (one.prompt, one.answer) == (two.prompt, two.answer)
    for mine, yours in zip(one.images + one.frames, two.images + two.frames, strict=True):
        np.testing.assert_array_equal(mine, yours)
    assert len(one.frames) in pictures.FRAME_COUNTS if kind == "motion" else len(one.images) in (1, 2)


def test_answers_are_spread_evenly() -> None:
    rng = np.random.default_rng(6)
    answers = [pictures.draw(rng, "more").answer for _ in range(200)]
    assert 70 <= answers.count("first") <= 130


def test_the_checkpoint_is_small() -> None:
    assert sum(file.stat().st_size for file in (DEMO / "checkpoint").iterdir()) < 10 * MEGABYTE
    assert sum(file.stat().st_size for file in (DEMO / "pictures").iterdir()) < MEGABYTE


def test_accuracy_is_stated_and_high() -> None:
    report = json.loads((DEMO / "checkpoint" / "accuracy.json").read_text(encoding="utf-8"))
    assert set(report["accuracy"]) == set(pictures.KINDS)
    assert min(report["accuracy"].values()) > 0.95
    assert report["questions_per_kind"] >= 200


def test_the_geometry_is_the_published_one_in_miniature(asker: ask.Asker) -> None:
    text, vision = asker.model.config.text_config, asker.model.config.vision_config
    assert (text.num_attention_heads, text.num_key_value_heads, vision.num_heads) == (28, 4, 16)
    assert not asker.model.config.tie_word_embeddings


def test_every_bias_matters(asker: ask.Asker) -> None:
    biases = {name: value for name, value in asker.model.named_parameters() if name.endswith(".bias")}
    assert biases
    for name, value in biases.items():
        assert value.ne(0).float().mean() > 0.99, name
        assert value.abs().mean() > 1e-4, name


@pytest.mark.parametrize("text", ["What colour is the shape?", "Grüße, 日本語 🙂\t\n\n  x\x00", "", "\u200b zero"])
def test_any_text_comes_back_from_the_tokenizer(asker: ask.Asker, text: str) -> None:
    tokenizer = asker.processor.tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_requests_cover_every_kind() -> None:
    lines = [json.loads(line) for line in demo_set.REQUESTS.read_text(encoding="utf-8").splitlines()]
    assert {line["id"].split("-")[1] for line in lines} == set(pictures.KINDS)
    assert all((DEMO / name).is_file() for line in lines for name in line["images"] + line["videos"])


def test_clips_are_sampled_to_an_even_number_of_frames() -> None:
    clips = sorted((DEMO / "pictures").glob("*.mp4"))
    assert [len(demo_set.read_clip(clip)) for clip in clips] == [6, 4]


def test_every_request_is_answered_right(asker: ask.Asker) -> None:
    items = [item for _, item in demo_set.read()]
    assert asker.answer(items) == [item.answer for item in items]


def test_freshly_drawn_pictures_are_answered_right(asker: ask.Asker) -> None:
    shares: dict[str, Any] = ask.accuracy(asker, per_kind=12, seed=99)
    assert sum(shares.values()) / len(shares) > 0.95
    assert min(shares.values()) >= 10 / 12
