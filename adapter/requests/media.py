"""Read images and videos, local files and data: URLs, into upright RGB pixels, no more than the model will see.

`part` is a Transformers image or video processor: its `size`, `patch_size`, `merge_size`, `temporal_patch_size` and
the `smart_resize` of its own module.
"""

from __future__ import annotations

import base64
import inspect
import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torchvision.transforms.v2 import functional as torch_images

from adapter.config.schema import Processor
from policies.errors import UserError

FORMATS = (  # of Pillow's: those that start no program
    "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM",
    *(("AVIF",) if "avif" in features.modules and features.check("avif") else ()),
)
MOST_PIXELS = 89_478_485  # of one image or frame before resizing: Pillow's own limit for a decompression bomb
LEAST_FRAMES = 4  # of a video that has them, as in Qwen's own sampling
DATA_URL = re.compile(r"data:(\w+)/[\w.+-]+(?:;[^,;]+)*;base64,(.*)", re.DOTALL)
AV_OPTIONS = {
    "protocol_whitelist": "none",  # a playlist inside a file must not make FFmpeg open anything else
    "max_pixels": str(MOST_PIXELS),  # a decoder refuses a larger frame before it allocates memory for it
}
TORCH_BACKED = {"BaseImageProcessorFast", "TorchvisionBackend", "BaseVideoProcessor"}  # classes that resize with torch

Room = Callable[[int, int, int], None]  # raises UserError if so many frames, of that height and width, are too many


@dataclass(frozen=True)
class Video:
    """The frames of a video that the model sees.

    frames: uint8 [T, H, W, 3], T a multiple of the temporal patch. indices: which of the video's `total` frames those
    are. rate: frames per second of the video itself.
    """

    frames: NDArray[np.uint8]
    indices: list[int]
    total: int
    rate: float


def image_size(value: str) -> tuple[int, int]:
    """Return (height, width) of an image as stored, from its header; nothing is decoded. Raises UserError."""
    with _opened_image(value) as image:
        return image.height, image.width


def load_image(value: str) -> Image.Image:
    """Read a local file or data: URL as an upright RGB image at its full size. Raises UserError for anything else."""
    with _opened_image(value) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)


@contextmanager
def _opened_image(value: str) -> Iterator[Image.Image]:
    """An image whose header is read and whose size is allowed. Raises UserError, also for what is raised within."""
    with _open(value, "image") as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise UserError(f"{image.width} x {image.height} pixels are too many, {MOST_PIXELS} are allowed")
                yield image
        except UnidentifiedImageError:
            raise UserError(f"image {_shown(value)}: not an image of a known format: {', '.join(FORMATS)}") from None
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
    return image if image.mode == "RGB" else image.convert("RGB")


def sample(total: int, rate: float, fps: float, most: int, patch: int) -> list[int]:
    """Choose which of a video's `total` frames to keep: `fps` a second, evenly spread from the first to the last.

    A multiple of `patch`, LEAST_FRAMES or more and `most` or fewer; of a video with fewer than LEAST_FRAMES all.
    """
    wanted = min(max(total / rate * fps, LEAST_FRAMES), most // patch * patch, total)
    count = total if wanted == total < LEAST_FRAMES else max(int(wanted) // patch * patch, 1)
    return [int(index) for index in np.linspace(0, total - 1, count).round()]


def video_of_images(values: Sequence[str], part: Any, section: Processor, room: Room) -> Video:
    """Read a video stated as its frames, taken to be `section.fps` a second. Raises UserError."""
    total = len(values)
    count = min(total, section.max_frames // part.temporal_patch_size * part.temporal_patch_size)
    indices = [int(index) for index in np.linspace(0, total - 1, count).round()]
    room(count, *image_size(values[0]))
    frames: dict[str, NDArray[np.uint8]] = {}
    for value in (values[index] for index in indices):
        if value not in frames:
            frames[value] = np.asarray(shrunk(load_image(value), part, count))
        if frames[value].shape != frames[values[0]].shape:
            raise UserError(f"video frame {_shown(value)}: not of the same size as the first frame")
    return _video([frames[values[index]] for index in indices], indices, total, section.fps, part)


def video_of_file(value: str, part: Any, section: Processor, room: Room) -> Video:
    """Sample a video file, each frame shrunk to the pixel limit as it is decoded. Raises UserError."""
    with _open(value, "video") as file:
        try:
            total, rate, height, width = _probe(file)
            while total:
                indices = sample(total, rate or section.fps, section.fps, section.max_frames, part.temporal_patch_size)
                room(len(indices), height, width)
                frames, decoded = _decode(file, indices, part)
                if len(frames) == len(indices):
                    return _video(frames, indices, total, rate or section.fps, part)
                total = decoded  # fewer than there are packets, as when some packets are never shown
        except av.FFmpegError as error:
            raise UserError(f"video {_shown(value)}: cannot be decoded: {error.strerror}") from error
    raise UserError(f"video {_shown(value)}: there is not one frame in it")


def _probe(file: BinaryIO) -> tuple[int, float, int, int]:
    """(frames, frames per second or 0, height, width), read from the packets without decoding them.

    Raises UserError where a frame has more than MOST_PIXELS pixels.
    """
    with av.open(file, options=AV_OPTIONS) as container:
        if not container.streams.video:
            return 0, 0.0, 0, 0
        stream = container.streams.video[0]
        height, width = stream.codec_context.height, stream.codec_context.width
        total = sum(1 for packet in container.demux(stream) if packet.size)
        if total and not 0 < height * width <= MOST_PIXELS:  # 0: FFmpeg found a size that it does not allow
            size = f"{width} x {height}" if height * width else "an unknown number of"
            raise UserError(f"frames of {size} pixels are too many, {MOST_PIXELS} are allowed in each")
        return total, float(stream.average_rate or 0), height, width


def _decode(file: BinaryIO, indices: Sequence[int], part: Any) -> tuple[list[NDArray[np.uint8]], int]:
    """The frames at `indices`, upright, [H, W, 3] each, and how many were decoded; both fewer where the video ends."""
    file.seek(0)
    frames: list[NDArray[np.uint8]] = []
    decoded = 0
    with av.open(file, options=AV_OPTIONS) as container:
        context = container.streams.video[0].codec_context
        context.thread_type, context.options = "AUTO", {"max_pixels": AV_OPTIONS["max_pixels"]}
        for frame in container.decode(video=0):
            if decoded == indices[len(frames)]:
                upright = frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True)
                frames.append(np.asarray(shrunk(upright, part, len(indices))))
            decoded += 1
            if len(frames) == len(indices):
                break
    return frames, decoded


def _video(frames: list[NDArray[np.uint8]], indices: list[int], total: int, rate: float, part: Any) -> Video:
    """Repeats the last frame until the temporal patches are full."""
    short = -len(frames) % part.temporal_patch_size
    return Video(np.stack(frames + frames[-1:] * short), indices + indices[-1:] * short, total, rate)


def shrunk(image: Image.Image, part: Any, frames: int = 1) -> Image.Image:
    """Return the image as `part` would resize it, if that makes it smaller and leaves `part` nothing to resize.

    frames: how many frames the image's video has; 1 for an image. The pixels are those of `part`'s own resizing.
    """
    size = kept_size(part, frames, image.height, image.width)
    if size == (image.height, image.width):
        return image
    if TORCH_BACKED.isdisjoint(kind.__name__ for kind in type(part).__mro__):
        return image.resize(size[::-1], Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    bicubic = torch_images.InterpolationMode.BICUBIC
    smaller = torch_images.resize(pixels, list(size), interpolation=bicubic, antialias=True)
    return Image.fromarray(smaller.permute(1, 2, 0).numpy())


def kept_size(part: Any, frames: int, height: int, width: int) -> tuple[int, int]:
    """Return (height, width) at which an image or frame of that size is held in memory after it was read."""
    if frames * height * width <= part.size["longest_edge"]:
        return height, width
    size = _resized(part, frames, height, width)
    is_smaller = size[0] * size[1] < height * width
    is_final = _resized(part, frames, *size) == size  # not where min_pixels is too near to max_pixels
    is_bicubic = getattr(part, "resample", Image.Resampling.BICUBIC) == Image.Resampling.BICUBIC
    return size if is_smaller and is_final and is_bicubic else (height, width)


def _resized(part: Any, frames: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) to which `part` resizes. Raises UserError for a shape that cannot be resized."""
    low, high = part.size["shortest_edge"], part.size["longest_edge"]
    resize, cell = _smart_resize(part), part.patch_size * part.merge_size
    try:
        if limits_whole_videos(part):
            patch = part.temporal_patch_size
            size = resize(max(frames, patch), height, width, patch, cell, low, high)
        else:
            size = resize(height, width, cell, low, high)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"an image or video of {width} x {height} pixels cannot be resized: {error}") from None
    if not all(size):
        raise UserError(f"nothing is left of {width} x {height} pixels under max_pixels = {high}; raise max_pixels")
    return int(size[0]), int(size[1])


def limits_whole_videos(part: Any) -> bool:
    """Whether the pixel limits of `part` are those of all frames of a video together, and not of each."""
    return "num_frames" in inspect.signature(_smart_resize(part)).parameters


def _smart_resize(part: Any) -> Callable[..., tuple[int, int]]:
    """The function by which the family of `part` chooses a size: that of the module of its class, or of a base."""
    for kind in type(part).__mro__:
        function: Callable[..., tuple[int, int]] | None
        if (function := getattr(sys.modules.get(kind.__module__), "smart_resize", None)) is not None:
            return function
    raise UserError(f"{type(part).__name__}: no smart_resize beside it, so how many tokens an image takes is unknown")


def tokens(part: Any, frames: int, height: int, width: int) -> int:
    """Return how many tokens an image or video takes, known before its pixels are worked on."""
    new_height, new_width = _resized(part, frames, height, width)
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
