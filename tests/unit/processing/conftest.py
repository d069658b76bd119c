"""Media files of every kind, and the demo checkpoint's processor, made once."""

from __future__ import annotations

import warnings

import pytest
from media_and_requests import CHECKPOINT, LIMITS, data_url, picture, video

from adapter.requests.processing import RequestProcessor


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Pictures and videos of every kind that the tests use, by name."""
    home = tmp_path_factory.mktemp("media")
    made = {"a": picture(home / "a.png"), "b": picture(home / "b.png", (56, 112), 1)}
    made["long"] = video(home / "long.mp4", range(0, 200, 5))  # 40 frames, 10 seconds
    for n in (1, 2, 3, 5):
        made[f"video{n}"] = video(home / f"video{n}.mp4", range(0, 40 * n, 40))
    made["a_url"], made["video3_url"] = data_url(made["a"], "image/png"), data_url(made["video3"], "video/mp4")
    made["home"] = str(home)
    return made


@pytest.fixture(scope="session")
def processor():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RequestProcessor(CHECKPOINT, LIMITS, max_prompt_tokens=2000)
