"""How much memory a request may take: a limit before anything is decoded, and one image at full size at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT
from media_and_requests import ask, picture, reason
from PIL import Image

from adapter.config.load import parse_request
from adapter.requests import media
from adapter.requests.processing import RequestProcessor, _video_processor

MB = 1 << 20


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    home = tmp_path_factory.mktemp("big")
    outcome = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("peak_worker.py")), str(home)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}, check=False)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return json.loads(outcome.stdout)


@pytest.mark.long
@pytest.mark.parametrize("codec", ["libx264", "ffv1"])
def test_a_video_of_frames_that_are_too_large_is_refused_before_they_are_decoded(peaks, codec):
    peak, _, reason = peaks[codec]
    assert "too many" in reason and "89478485" in reason, reason
    assert peak < 100 * MB, peak / MB


@pytest.mark.long
def test_images_that_leave_no_room_are_refused_before_they_are_decoded(peaks):
    peak, _, reason = peaks["no room"]
    assert "at most 40 fit" in reason and peak < 30 * MB, (reason, peak / MB)


@pytest.mark.long
def test_one_image_is_held_without_needless_copies_while_it_is_shrunk(peaks):
    assert peaks["one"][0] < 3.7 * 75_000_000, peaks["one"][0]


@pytest.mark.long
@pytest.mark.parametrize("case", ["eight times one", "six different", "frames"])
def test_only_one_image_is_held_at_its_full_size(peaks, case):
    peak, tokens, reason = peaks[case]
    assert tokens, reason
    assert peak < peaks["one"][0] + 50 * MB, (peak / MB, peaks["one"][0] / MB)


@pytest.mark.long
@pytest.mark.parametrize("case", ["not shrunk", "unshrunk frames"])
def test_what_cannot_be_shrunk_as_it_is_read_has_a_limit_of_its_own(peaks, case):
    peak, _, reason = peaks[case]
    assert "pixels" in reason and "lower max_frames" in reason and peak < 200 * MB, (reason, peak / MB)


def test_an_image_is_read_once_however_often_it_is_used(processor, files, monkeypatch):
    loaded = []
    load = media.load_image
    monkeypatch.setattr(media, "load_image", lambda value, *rest: loaded.append(value) or load(value, *rest))
    ask(processor, images=[files["a"], files["b"], files["a"]], videos=[[files["a"]] * 4])
    assert sorted(loaded) == sorted([files["a"], files["b"], files["a"]])  # once as an image, once as a frame


def test_memory_that_is_not_there_fails_the_request_and_nothing_else(processor, files, monkeypatch):
    def none_left(*_):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(RequestProcessor, "_render", none_left)
        assert "more memory than" in reason(processor, images=[files["a"]])
    assert ask(processor, images=[files["a"]]).prompt_tokens


def test_a_shrunk_image_has_the_patches_of_the_processor_itself(processor, tmp_path):
    """Bit for bit: what is resized as it is read is resized as the checkpoint's processor does."""
    path = picture(tmp_path / "big.png", (301, 211), seed=3)
    limits = {"min_pixels": 784, "max_pixels": 12544}
    ours = ask(processor, images=[path], **limits).tensors
    part = processor._with_limits(media_request(path, limits)).image_processor
    theirs = part(images=[Image.open(path).convert("RGB")], return_tensors="pt")
    assert (ours["image_grid_thw"] == theirs["image_grid_thw"]).all()
    assert (ours["pixel_values"] == theirs["pixel_values"]).all()


def test_shrunk_frames_have_the_patches_of_the_processor_itself(processor, tmp_path):
    paths = [picture(tmp_path / f"{n}.png", (301, 211), seed=n) for n in range(4)]
    limits = {"min_pixels": 784, "max_pixels": 12544}
    ours = ask(processor, videos=[paths], **limits).tensors
    part = _video_processor(processor._with_limits(media_request(paths[0], limits)))
    frames = np.stack([np.asarray(Image.open(path)) for path in paths])
    how = {"do_sample_frames": False} if hasattr(processor._processor, "video_processor") else {}
    given = {"images": None, "videos": [frames]} if not how else {"videos": [frames]}
    theirs = part(**given, return_tensors="pt", **how)
    assert (ours["video_grid_thw"] == theirs["video_grid_thw"]).all()
    assert (ours["pixel_values_videos"] == theirs["pixel_values_videos"]).all()


def media_request(path, limits):
    return parse_request({"id": "r", "prompt": "x", "images": [path], **limits})
