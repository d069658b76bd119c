"""Pictures and films: local files and data: URLs -> upright RGB pixels, no more of them than the model will see.

`part` is a Transformers image or video processor: its `size`, `patch_size`, `merge_size` and `temporal_patch_size`.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from adapter.config.schema import Processor
from policies.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # of Pillow's: those that start no program
MOST_PIXELS = 89_478_485  # of one picture before resizing: Pillow's own idea of a decompression bomb
LEAST_FRAMES = 4  # of a film that has them, as in Qwen's own sampling
DATA_URL = re.compile(r"data:(\w+)/[\w.+-]+(?:;[^,;]+)*;base64,(.*)", re.DOTALL)
AV_OPTIONS = {"protocol_whitelist": "none"}  # a playlist inside a file must not make FFmpeg open anything else

Room = Callable[[int, int, int], None]  # raises UserError if so many frames, of that height and width, are too many


@dataclass(frozen=True)
class Film:
    """frames: uint8 [T, H, W, 3], T a multiple of the temporal patch; indices: which of the film's `total` they are."""

    frames: NDArray[np.uint8]
    indices: list[int]
    total: int
    rate: float  # frames per second of the film itself


def load_image(value: str) -> Image.Image:
    """A local file or data: URL as an upright RGB picture. Raises UserError for anything else."""
    with _open(value, "image") as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise UserError(f"{image.width} x {image.height} pixels are too many, {MOST_PIXELS} are allowed")
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
        except UnidentifiedImageError:
            raise UserError(f"image {_shown(value)}: not a picture of a known format: {', '.join(FORMATS)}") from None
        except MemoryError:
            raise
        except Exception as error:  # decoders raise nearly everything
            raise UserError(f"image {_shown(value)}: cannot be decoded: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise UserError("its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits a channel")
    if "A" in image.getbands() or "transparency" in image.info:  # on white, as Qwen's own code shows it
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def sample(total: int, rate: float, fps: float, most: int, patch: int) -> list[int]:
    """Which of a film's `total` frames to keep: `fps` a second, evenly spread from the first to the last.

    A multiple of `patch`, LEAST_FRAMES or more and `most` or fewer; of a film with fewer than LEAST_FRAMES all.
    """
    wanted = min(max(total / rate * fps, LEAST_FRAMES), most // patch * patch, total)
    count = total if wanted == total < LEAST_FRAMES else max(int(wanted) // patch * patch, 1)
    return [int(index) for index in np.linspace(0, total - 1, count).round()]


def film_of_pictures(values: Sequence[str], part: Any, section: Processor, room: Room) -> Film:
    """A film stated as its frames, taken to be `section.fps` a second. Raises UserError."""
    total = len(values)
    count = min(total, section.max_frames // part.temporal_patch_size * part.temporal_patch_size)
    indices = [int(index) for index in np.linspace(0, total - 1, count).round()]
    frames: list[NDArray[np.uint8]] = []
    for index in indices:
        image = load_image(values[index])
        room(len(indices), image.height, image.width)
        frames.append(_shrunk(image, part))
        if frames[-1].shape != frames[0].shape:
            raise UserError(f"video frame {_shown(values[index])}: not of the same size as the first frame")
    return _film(frames, indices, total, section.fps, part)


def film_of_file(value: str, part: Any, section: Processor, room: Room) -> Film:
    """Sample a film file, each frame shrunk to the pixel limit as it is decoded. Raises UserError."""
    with _open(value, "video") as file:
        try:
            total, rate, height, width = _probe(file)
            while total:
                indices = sample(total, rate or section.fps, section.fps, section.max_frames, part.temporal_patch_size)
                room(len(indices), height, width)
                frames, decoded = _decode(file, indices, part)
                if len(frames) == len(indices):
                    return _film(frames, indices, total, rate or section.fps, part)
                total = decoded  # fewer than there are packets, as when some packets are never shown
        except av.FFmpegError as error:
            raise UserError(f"video {_shown(value)}: cannot be decoded: {error.strerror}") from error
    raise UserError(f"video {_shown(value)}: there is not one frame in it")


def _probe(file: BinaryIO) -> tuple[int, float, int, int]:
    """(frames, frames per second or 0, height, width), read from the packets without decoding them."""
    with av.open(file, options=AV_OPTIONS) as container:
        if not container.streams.video:
            return 0, 0.0, 0, 0
        stream = container.streams.video[0]
        total = sum(1 for packet in container.demux(stream) if packet.size)
        return total, float(stream.average_rate or 0), stream.codec_context.height, stream.codec_context.width


def _decode(file: BinaryIO, indices: Sequence[int], part: Any) -> tuple[list[NDArray[np.uint8]], int]:
    """The frames at `indices`, upright, [H, W, 3] each, and how many were decoded; both fewer where the film ends."""
    file.seek(0)
    frames: list[NDArray[np.uint8]] = []
    decoded = 0
    with av.open(file, options=AV_OPTIONS) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            if decoded == indices[len(frames)]:
                frames.append(_shrunk(frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True), part))
            decoded += 1
            if len(frames) == len(indices):
                break
    return frames, decoded


def _film(frames: list[NDArray[np.uint8]], indices: list[int], total: int, rate: float, part: Any) -> Film:
    """Repeats the last frame until the temporal patches are full."""
    short = -len(frames) % part.temporal_patch_size
    return Film(np.stack(frames + frames[-1:] * short), indices + indices[-1:] * short, total, rate)


def _shrunk(image: Image.Image, part: Any) -> NDArray[np.uint8]:
    """A frame above the pixel limit, resized as the processor would if that leaves it nothing to resize."""
    if image.width * image.height > part.size["longest_edge"]:
        height, width = _resized(part, image.height, image.width)
        if _resized(part, height, width) == (height, width):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _resized(part: Any, height: int, width: int) -> tuple[int, int]:
    """Height and width after resizing. Raises UserError for a shape that cannot be resized."""
    low, high = part.size["shortest_edge"], part.size["longest_edge"]
    try:
        size = smart_resize(height, width, part.patch_size * part.merge_size, low, high)
    except ValueError as error:
        raise UserError(f"a picture or film of {width} x {height} pixels cannot be resized: {error}") from None
    if not all(size):
        raise UserError(f"nothing is left of {width} x {height} pixels under max_pixels = {high}; raise max_pixels")
    return size


def tokens(part: Any, frames: int, height: int, width: int) -> int:
    """How many tokens a picture or film takes, known before its pixels are worked on."""
    new_height, new_width = _resized(part, height, width)
    if count := getattr(part, "get_num_of_video_patches", None):
        return int(count(frames, height, width, {})) // part.merge_size**2
    cells = new_height * new_width // (part.patch_size * part.merge_size) ** 2
    return math.ceil(frames / part.temporal_patch_size) * cells


def _open(value: str, kind: str) -> BinaryIO:
    """A regular local file, or the bytes of a base64 data: URL of that kind. Raises UserError."""
    if value.startswith("data:"):
        match = DATA_URL.fullmatch(value)
        if match is None or match[1].lower() != kind:
            raise UserError(f"{kind} {_shown(value)}: a data: URL must read data:{kind}/...;base64,...")
        try:
            return io.BytesIO(base64.b64decode("".join(match[2].split()), validate=True))
        except ValueError as error:
            raise UserError(f"{kind} {_shown(value)}: not valid base64: {error}") from None
    if "://" in value:
        raise UserError(f"{kind} {_shown(value)}: only local paths and data: URLs are read; download it first")
    if not os.path.isfile(value):  # unlike Path's it has an answer to every path, one with NUL or too long included
        why = "not a regular file" if os.path.exists(value) else "no such file"
        raise UserError(f"{kind} {_shown(value)}: {why}")
    if not os.path.getsize(value):
        raise UserError(f"{kind} {_shown(value)}: the file is empty")
    try:
        return open(value, "rb")
    except OSError as error:
        raise UserError(f"{kind} {_shown(value)}: {error.strerror}") from None


def _shown(value: str) -> str:
    return value if len(value) <= 200 else f"{value[:40]}... ({len(value)} characters)"
