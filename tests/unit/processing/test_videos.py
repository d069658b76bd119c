"""Videos to frames: the right ones, no more of them than the model sees, and a reason for every wrong video."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from media_and_requests import CHECKPOINT, LIMITS, ask, reason, video
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from adapter.requests import media
from adapter.requests.media import sample
from adapter.requests.processing import RequestProcessor, _Room


def test_sample_like_qwen():
    assert sample(40, 4, 2, 768, 2) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 21, 23, 25, 27, 29, 31, 33, 35, 37, 39]
    assert sample(100, 25, 2, 768, 2) == [0, 14, 28, 42, 57, 71, 85, 99]
    assert sample(100, 100, 2, 768, 2) == [0, 33, 66, 99]  # one second: four at the least
    assert sample(100, 25, 2, 5, 2) == [0, 33, 66, 99]
    assert sample(100, 25, 2, 2, 2) == [0, 99]
    assert sample(7, 1, 2, 768, 2) == [0, 1, 2, 4, 5, 6]
    assert [sample(n, 25, 2, 768, 2) for n in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]


def test_sample_holds_its_promises():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        total, most = int(rng.integers(1, 400)), int(rng.integers(2, 60))
        rate, fps = rng.uniform(0.1, 120), rng.uniform(0.05, 30)
        picked = sample(total, rate, fps, most, 2)
        assert picked == sorted(set(picked)) and picked[0] >= 0 and picked[-1] < total
        assert len(picked) <= most
        assert len(picked) % 2 == 0 or total < 4
        assert len(picked) >= min(total, 4, most // 2 * 2)
        assert picked[-1] == total - 1 or len(picked) == 1


def levels(tensors) -> list[float]:
    """The grey level of each frame of one video, from its normalised patches [rows, 3 * 2 * 14 * 14]."""
    grid = tensors["video_grid_thw"][0].tolist()
    red = tensors["pixel_values_videos"].reshape(grid[0], grid[1] * grid[2], 3, 2, 14 * 14)[:, :, 0]
    return ((red.mean(dim=(1, 3)) * 0.26862954 + 0.48145466) * 255).flatten().tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("long", [5 * i for i in sample(40, 4, 2, 768, 2)]),
        ("video5", [0, 40, 120, 160]),
        ("video3", [0, 40, 80, 80]),
        ("video2", [0, 40]),
        ("video1", [0, 0]),
    ],
)
def test_the_right_frames_are_taken(processor, files, name, expected):
    assert levels(ask(processor, videos=[files[name]]).tensors) == pytest.approx(expected, abs=4)


@pytest.mark.parametrize("section", [{"fps": 1.0}, {"max_frames": 10}, {"max_frames": 11}])
def test_fps_and_max_frames(files, section):
    processor = RequestProcessor(CHECKPOINT, LIMITS.model_copy(update=section), 2000)
    expected = [5 * i for i in sample(40, 4, 1, 768, 2)]  # ten frames by any of these
    assert levels(ask(processor, videos=[files["long"]]).tensors) == pytest.approx(expected, abs=4)
    frames = [[files["a"]] * 25]
    wanted = 26 if "fps" in section else 10
    assert ask(processor, videos=frames).tensors["video_grid_thw"].tolist() == [[wanted // 2, 4, 6]]


def test_a_short_video_is_filled_with_its_last_frame(processor, files):
    video = processor._load_video(files["video3"], processor._processor, _Room(2000))
    assert (video.frames.shape, video.indices, video.total, video.rate) == ((4, 56, 84, 3), [0, 1, 2, 2], 3, 4.0)
    assert (video.frames[3] == video.frames[2]).all()


def test_only_the_frames_that_are_needed_are_kept(processor, files, monkeypatch):
    kept = []
    monkeypatch.setattr(media, "shrunk", lambda image, *rest: kept.append(1) or image)
    ask(processor, videos=[files["long"]])
    assert len(kept) == 20


def test_frames_above_the_limit_are_shrunk_as_they_come(processor, tmp_path, monkeypatch):
    big = video(tmp_path / "big.mp4", range(0, 160, 10), size=(336, 224))
    shapes = []
    video_of = media._video
    monkeypatch.setattr(media, "_video", lambda new, *rest: shapes.append(new[0].shape) or video_of(new, *rest))
    grids = {}
    for low in (784, 12544):  # with the second, shrinking would leave less than the least: the processor does it all
        grids[low] = ask(processor, videos=[big], min_pixels=low, max_pixels=12544).tensors["video_grid_thw"].tolist()
        assert grids[low] == [[4, *(side // 14 for side in smart_resize(224, 336, 28, low, 12544))]]
    assert shapes == [(84, 112, 3), (224, 336, 3)]


def test_packets_that_are_never_shown(processor, files, monkeypatch):
    """The packets promise 49 frames and 40 come: these are spread over the video as if 40 had been promised."""
    probe = media._probe
    monkeypatch.setattr(media, "_probe", lambda file: (49, *probe(file)[1:]))
    expected = [5 * i for i in sample(40, 4, 2, 768, 2)]
    assert levels(ask(processor, videos=[files["long"]]).tensors) == pytest.approx(expected, abs=4)


def test_a_video_turned_by_its_container_is_upright(processor, tmp_path):
    path = Path(video(tmp_path / "turned.mp4", [0] * 4, size=(112, 56)))
    data = path.read_bytes()
    upright = b"".join(n.to_bytes(4, "big") for n in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    clockwise = b"".join(n.to_bytes(4, "big") for n in (0, 1 << 16, 0, 0xFFFF0000, 0, 0, 56 << 16, 0, 1 << 30))
    at = data.index(upright, data.index(b"tkhd"))
    path.write_bytes(data[:at] + clockwise + data[at + 36 :])
    assert ask(processor, videos=[str(path)]).tensors["video_grid_thw"].tolist() == [[2, 8, 4]]


def bad_videos(home: Path, files) -> dict[str, tuple[object, str]]:
    good = Path(files["long"]).read_bytes()
    cut, empty, text, silent = (home / f"{name}.mp4" for name in ("cut", "empty", "text", "silent"))
    playlist = Path(files["home"]) / "playlist.mp4"
    cut.write_bytes(good[: len(good) // 2])
    empty.write_bytes(b"")
    text.write_bytes(b"not a video")
    playlist.write_text("ffconcat version 1.0\nfile 'long.mp4'\n")  # a video that has FFmpeg open another file
    with av.open(str(silent), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {
        "missing": (str(home / "gone.mp4"), "no such file"),
        "truncated": (str(cut), "cannot be decoded"),
        "empty": (str(empty), "the file is empty"),
        "text": (str(text), "cannot be decoded"),
        "playlist": (str(playlist), "cannot be decoded"),
        "sound only": (str(silent), "not one frame"),
        "http": ("http://example.com/x.mp4", "only local paths and data: URLs"),
        "url of a picture": (files["a_url"], "must read data:video/"),
        "url of nothing": ("data:video/mp4;base64,", "cannot be decoded"),
        "frames of two sizes": ([files["a"], files["b"]], "not of the same size"),
        "a missing frame": ([files["a"], "/gone.png"], "no such file"),
    }


def test_bad_videos_are_named_with_a_reason(processor, files, tmp_path):
    for name, (value, words) in bad_videos(tmp_path, files).items():
        reported = reason(processor, videos=[value])
        assert words in reported, (name, reported)
