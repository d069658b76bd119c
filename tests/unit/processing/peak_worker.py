"""Prints how much memory preparing a request takes at its peak, as JSON: {case: [bytes, tokens or None, reason]}.

    python peak_worker.py HOME        each case in a process of its own
"""

from __future__ import annotations

import json
import os
import resource
import sys
import warnings
from pathlib import Path

import av
import numpy as np
import psutil
from media_and_requests import CHECKPOINT
from PIL import Image

from adapter.config.load import parse_request
from adapter.config.schema import Processor
from adapter.requests.processing import RequestError, RequestProcessor

HIGH, WIDE = 9000, 10_000  # above Pillow's limit, 89 megapixels
SIDE = 5000  # 75 MB of RGB


def one_frame(path: Path, size: tuple[int, int], codec: str) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=4)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((size[1] * 3 // 2, size[0]), 128, np.uint8), format="yuv420p")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def flat(path: Path, side: int, shade: int = 9) -> str:
    Image.new("RGB", (side, side), (shade, 0, 0)).save(path, compress_level=1)
    return str(path)


def cases(home: Path):
    image = flat(home / "flat.png", SIDE)
    others = [flat(home / f"{n}.png", SIDE, n) for n in range(6)]
    low = {"min_pixels": 784, "max_pixels": 12544}
    yield "one", 2000, lambda: {"images": [image], **low}
    yield "eight times one", 2000, lambda: {"images": [image] * 8, **low}
    yield "six different", 2000, lambda: {"images": others, **low}
    yield "no room", 40, lambda: {"images": [image] * 8, **low}
    yield "frames", 2000, lambda: {"videos": [others], **low}
    yield "not shrunk", 2000, lambda: {"images": [image] * 80, "min_pixels": 12544, "max_pixels": 12544}
    yield "unshrunk frames", 2000, lambda: {"videos": [[image] * 80], "min_pixels": 12544, "max_pixels": 12544}
    for codec, kind in (("libx264", "mp4"), ("ffv1", "mkv")):
        yield codec, 2000, lambda path=home / f"big.{kind}": {"videos": [str(path)], **low}


def measured(limit: int, request: dict) -> list:
    processor = RequestProcessor(CHECKPOINT, Processor(), limit)
    before = psutil.Process().memory_info().rss
    tokens, reason = None, ""
    try:
        tokens = processor.prepare(parse_request({"id": "r", "prompt": "x", **request})).prompt_tokens
    except RequestError as error:
        reason = error.reason
    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, tokens, reason]


def forked(work):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, json.dumps(work()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as result:
        text = result.read()
    os.wait()
    return json.loads(text)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    home = Path(sys.argv[1])
    for codec, kind in (("libx264", "mp4"), ("ffv1", "mkv")):
        forked(lambda path=home / f"big.{kind}", codec=codec: one_frame(path, (WIDE, HIGH), codec))
    results = {}
    for name, limit, request in cases(home):
        results[name] = forked(lambda: measured(limit, request()))  # noqa: B023
    print(json.dumps(results))
