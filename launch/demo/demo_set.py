"""Write the demo's requests: pictures/*.png, pictures/*.mp4 and requests.jsonl, one line per question.

usage: python launch/demo/demo_set.py          write them
       python launch/demo/demo_set.py --check  ask the checkpoint what the files say; exit 1 if an answer is wrong
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pictures
from ask import HERE, Asker
from PIL import Image

SEED = 7
CLIP_FPS = 8  # frames per second in the file
SAMPLED_FPS = 2  # frames per second the model sees
FRAMES = (24, 16)  # of the first clip and the second: 3 and 2 seconds
ASKED = ("colour", "colour", "shape", "shape", "place", "count", "count", "more", "more", "more", "motion", "motion")
REQUESTS = HERE / "requests.jsonl"


def write_clip(path: Path, frames: Sequence[pictures.Picture]) -> None:
    """Encode frames as H.264 in an MP4."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=CLIP_FPS, options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = pictures.SIDE, pictures.SIDE, "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())


def read_clip(path: Path) -> tuple[pictures.Picture, ...]:
    """Decode all frames and keep SAMPLED_FPS of them a second: an even number, at least 4, evenly spread."""
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate or Fraction(CLIP_FPS)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    count = max(4, int(len(frames) / rate * SAMPLED_FPS) // 2 * 2)
    return tuple(frames[i * len(frames) // count] for i in range(count))


def write(folder: Path = HERE) -> None:
    """Draw one item for each of ASKED and write its files and its line."""
    rng = np.random.default_rng(SEED)
    (folder / "pictures").mkdir(exist_ok=True)
    lines, clips = [], iter(FRAMES)
    for number, kind in enumerate(ASKED, 1):
        stem = f"{number:02d}-{kind}"
        if pictures.KINDS[kind].layout == "clip":
            item = pictures.draw_clip(rng, next(clips))
            names = [f"pictures/{stem}.mp4"]
            write_clip(folder / names[0], item.frames)
        else:
            item = pictures.draw(rng, kind)
            letters = "ab" if len(item.images) > 1 else [""]
            names = [f"pictures/{stem}{letter}.png" for letter in letters]
            for name, picture in zip(names, item.images, strict=True):
                Image.fromarray(picture).save(folder / name, optimize=True)
        media = {"images": [], "videos": names} if item.frames else {"images": names, "videos": []}
        lines.append({"id": stem, "prompt": item.prompt, **media, "expected": item.answer})
    REQUESTS.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read(path: Path = REQUESTS) -> list[tuple[dict[str, Any], pictures.Item]]:
    """The lines of requests.jsonl, each with the item its files hold."""
    items = []
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        images = tuple(np.asarray(Image.open(path.parent / name).convert("RGB")) for name in line["images"])
        frames = tuple(frame for name in line["videos"] for frame in read_clip(path.parent / name))
        items.append((line, pictures.Item(line["id"], line["prompt"], line["expected"], images, frames)))
    return items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        return write()
    asker, wrong = Asker.load(), 0
    for line, item in read():
        answer = asker.answer([item])[0]
        wrong += answer != item.answer
        print(json.dumps({"id": line["id"], "answer": answer, "expected": item.answer}))
    sys.exit(int(wrong > 0))


if __name__ == "__main__":
    main()
