"""A family whose video processor limits the pixels of all frames together, and writes text before each frame."""

from __future__ import annotations

import pytest
import torch
from families import make_whole
from media_and_requests import TRANSFORMERS, ask, reason

from adapter.config.schema import Processor
from adapter.requests.processing import RequestProcessor

pytestmark = pytest.mark.skipif(TRANSFORMERS.release < (4, 57), reason="the release has no such family")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_whole(tmp_path_factory.mktemp("qwen3_vl") / "m", "qwen3_vl")


@pytest.fixture(scope="module")
def small_images(directory):
    return RequestProcessor(directory, Processor(min_pixels=28 * 28, max_pixels=56 * 56, fps=1.0), 2000)


def test_a_limit_for_images_leaves_videos_as_the_checkpoint_has_them(directory, files, small_images):
    generous = RequestProcessor(directory, Processor(min_pixels=28 * 28, max_pixels=112 * 112, fps=1.0), 2000)
    small, large = (ask(p, images=[files["b"]], videos=[files["video3"]]).tensors for p in (small_images, generous))
    assert int(small["image_grid_thw"].prod()) < int(large["image_grid_thw"].prod())
    assert small["video_grid_thw"].tolist() == large["video_grid_thw"].tolist()


def test_each_frame_has_its_tokens_between_marks_and_text(directory, files, small_images):
    tensors = ask(small_images, videos=[files["long"]]).tensors
    (frames, height, width), ids = tensors["video_grid_thw"][0].tolist(), tensors["input_ids"][0].tolist()
    token = small_images._pads["video"]
    runs = torch.tensor([t == token for t in ids]).int().diff().eq(1).sum()
    assert runs == frames > 1 and ids.count(token) == frames * height * width // 4
    assert "seconds>" in small_images._processor.tokenizer.decode(ids)
    types = tensors["mm_token_type_ids"][0].tolist()
    assert types == [2 * (t == token) for t in ids]


def test_a_video_of_too_many_tokens_is_refused_before_it_is_decoded(directory, files):
    narrow = RequestProcessor(directory, Processor(fps=1.0), 20)
    assert "at most 20 fit" in reason(narrow, videos=[files["long"]])
