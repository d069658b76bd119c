"""Pictures, videos and requests as these tests make them, and what they ask of a processor."""

from __future__ import annotations

import base64
from pathlib import Path

import av
import numpy as np
import pytest
import transformers
from packaging.version import Version
from PIL import Image

from adapter.config.load import parse_request
from adapter.config.schema import Processor
from adapter.requests.processing import RequestError

CHECKPOINT = Path(__file__).parents[3] / "launch" / "demo" / "checkpoint"
TRANSFORMERS = Version(transformers.__version__)
LIMITS = Processor(min_pixels=28 * 28, max_pixels=112 * 112)
SIZE = (84, 56)  # width and height: 3 x 2 merged patches, as it stands


def picture(path: Path, size=SIZE, seed=0, **how) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **how)
    return str(path)


def video(path: Path, levels, rate=4, size=SIZE, codec="mpeg4") -> str:
    """A video of even frames, each of one grey level."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.qmin = stream.codec_context.qmax = 1  # the grey levels shall survive
        for level in levels:
            frame = np.full((size[1], size[0], 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def data_url(path: str, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def ask(processor, prompt="what?", id="r", **rest):
    return processor.prepare(parse_request({"id": id, "prompt": prompt, **rest}))


def reason(processor, **request) -> str:
    with pytest.raises(RequestError) as caught:
        ask(processor, **request)
    assert caught.value.request_id == "r"
    assert str(caught.value) == f"request 'r': {caught.value.reason}"
    return caught.value.reason
