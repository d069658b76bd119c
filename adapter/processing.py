"""Prompts, pictures and films -> the tensors the model takes; what is wrong with one request stays with that request.

    processor = RequestProcessor(config.model.path, config.processor, max_prompt_tokens=4096)
    batch = collate([processor.prepare(request) for request in requests], processor.pad_token_id)

Only local files and base64 data: URLs are read; nothing is fetched and no code of a checkpoint is run. Of a film only
the frames that the model sees are kept, at the size it sees them, so that a long one needs no more memory.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from packaging.version import Version
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from adapter.config import Processor, Request
from policies.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # of Pillow's: those that start no program
MOST_PIXELS = 89_478_485  # of one picture before resizing: Pillow's own idea of a decompression bomb
LEAST_FRAMES = 4  # of a film that has them, as in Qwen's own sampling
DATA_URL = re.compile(r"data:(\w+)/[\w.+-]+(?:;[^,;]+)*;base64,(.*)", re.DOTALL)
AV_OPTIONS = {"protocol_whitelist": "none"}  # a playlist inside a file must not make FFmpeg open anything else
TYPE_IDS = Version(transformers.__version__).major >= 5  # from then on rotary positions need mm_token_type_ids

Turns = list[tuple[str, list[tuple[str, Any]]]]  # [(role, [(kind, value)])], kind being text, image or video
Room = Callable[[int, int, int], None]  # raises UserError if so many frames, of that height and width, are too many


class RequestError(UserError):
    """One request cannot be run; the others can. `reason` is the message without the request's id."""

    def __init__(self, request_id: str, reason: str) -> None:
        super().__init__(f"request {request_id!r}: {reason}")
        self.request_id, self.reason = request_id, reason


@dataclass(frozen=True)
class Film:
    """frames: uint8 [T, H, W, 3], T a multiple of the temporal patch; indices: which of the film's `total` they are."""

    frames: NDArray[np.uint8]
    indices: list[int]
    total: int
    rate: float  # frames per second of the film itself


@dataclass(frozen=True)
class Prepared:
    """One request, ready for the model.

    tensors: input_ids, attention_mask and with Transformers 5 mm_token_type_ids (0 text, 1 picture, 2 film), int64
    [1, S]; with pictures pixel_values, float32 [patches, features], and image_grid_thw, int64 [pictures, 3]; with films
    pixel_values_videos and video_grid_thw alike; and whatever else the family's processor returns.
    """

    id: str
    tensors: dict[str, torch.Tensor]
    prompt_tokens: int


class RequestProcessor:
    """The checkpoint's own processor and tokenizer, with a user's limits. Raises UserError if they do not work."""

    def __init__(self, model_dir: str | Path, section: Processor, max_prompt_tokens: int) -> None:
        self._section, self._max_prompt_tokens = section, max_prompt_tokens
        try:
            self._processor = AutoProcessor.from_pretrained(
                str(model_dir), local_files_only=True, trust_remote_code=False
            )
            words = {"image": self._processor.image_token, "video": self._processor.video_token}
            self._places = {k: self._processor.tokenizer.convert_tokens_to_ids(word) for k, word in words.items()}
            if not self._processor.tokenizer.encode("?") or not self._render([("user", [("text", "?")])]):
                raise ValueError("the vocabulary or the chat template is empty")
        except Exception as error:
            raise UserError(
                f"{model_dir}: its processor, tokenizer or chat template cannot be used: {error}; the directory needs "
                "preprocessor_config.json, tokenizer.json, tokenizer_config.json and a chat template"
            ) from error
        tokenizer = self._processor.tokenizer
        specials = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._reserved = [*specials, "<|placeholder|>"]  # older releases expand the last to pictures' places
        self.eos_token_ids = _eos_token_ids(Path(model_dir), tokenizer.eos_token_id)
        self.pad_token_id: int = self.eos_token_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def prepare(self, request: Request) -> Prepared:
        """The tensors of one request. Raises RequestError for anything that is wrong with it."""
        try:
            return self._prepare(request)
        except MemoryError:
            raise
        except UserError as error:
            raise RequestError(request.id, str(error)) from error
        except Exception as error:  # whatever a library finds wrong with the input
            raise RequestError(request.id, f"cannot be prepared: {type(error).__name__}: {error}") from error

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of new tokens, special ones left out."""
        text: str = self._processor.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text.strip()

    def _prepare(self, request: Request) -> Prepared:
        turns = request.turns()
        _check_texts(turns, self._reserved)
        processor = self._with_limits(request)
        images = [load_image(value) for value in _media(turns, "image")]
        used = sum(_tokens(processor.image_processor, 1, image.height, image.width) for image in images)
        self._check_room(used, "the pictures alone take")
        films = []
        for value in _media(turns, "video"):
            films.append(self._load_film(value, processor, used))
            used += _tokens(_film_part(processor), *films[-1].frames.shape[:3])
        inputs = processor(
            text=[self._render(turns)], images=images or None, return_tensors="pt", **self._film_arguments(films)
        )
        tensors = {key: _as_tensor(value) for key, value in inputs.items() if key != "video_metadata"}
        ids = tensors["input_ids"]
        self._check_room(ids.shape[1], "the prompt has")
        self._check_places(tensors)
        if TYPE_IDS:
            places = enumerate((self._places["image"], self._places["video"]), start=1)
            tensors["mm_token_type_ids"] = sum((type_id * (ids == token).long() for type_id, token in places), 0 * ids)
        return Prepared(request.id, tensors, ids.shape[1])

    def _render(self, turns: Turns) -> str:
        """The chat template's text. Pictures and films are bare placeholders in it, so that it loads nothing itself."""

        def part(kind: str, value: Any) -> dict[str, Any]:
            return {"type": kind, "text": value} if kind == "text" else {"type": kind}

        chat = [{"role": role, "content": [part(*stated) for stated in parts]} for role, parts in turns]
        return str(self._processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    def _with_limits(self, request: Request) -> Any:
        """The processor with the pixel limits of this request: its own, else the section's, else the checkpoint's.

        The arguments of a call that set them change with the releases (4.49 takes none, 5 wants `size`), the attributes
        that hold them hardly: `size` always, and also `min_pixels` and `max_pixels` where a release has these.
        """
        processor = copy.copy(self._processor)
        for name in {"image_processor", "video_processor"} & vars(processor).keys():
            part = copy.copy(getattr(processor, name))
            low = request.min_pixels or self._section.min_pixels or part.size["shortest_edge"]
            high = request.max_pixels or self._section.max_pixels or part.size["longest_edge"]
            if low > high:
                raise UserError(
                    f"min_pixels = {low} is above max_pixels = {high}, as the request, the processor section and the "
                    "checkpoint have them together; state both"
                )
            part.size = type(part.size)(shortest_edge=low, longest_edge=high)
            for key, value in (("min_pixels", low), ("max_pixels", high), ("cap_pixels_per_frame", False)):
                if hasattr(part, key):  # the cap is 5.23's own limit on films, without which all releases agree
                    setattr(part, key, value)
            setattr(processor, name, part)
        return processor

    def _load_film(self, value: str | tuple[str, ...], processor: Any, used: int) -> Film:
        part = _film_part(processor)

        def room(frames: int, height: int, width: int) -> None:
            tokens = _tokens(part, frames, height, width)
            self._check_room(used + tokens, f"with a film of {frames} frames of {width} x {height} it has at least")

        if isinstance(value, tuple):
            return film_of_pictures(value, part, self._section, room)
        return film_of_file(value, part, self._section, room)

    def _film_arguments(self, films: Sequence[Film]) -> dict[str, Any]:
        """What the processor is told of films: they are sampled already, and when their frames were."""
        arguments: dict[str, Any] = {"videos": [film.frames for film in films]} if films else {}
        if films and hasattr(self._processor, "video_processor"):
            arguments["do_sample_frames"] = False
            arguments["video_metadata"] = [
                {"fps": film.rate, "total_num_frames": film.total, "frames_indices": film.indices} for film in films
            ]
        if films and "second_per_grid_ts" in self._processor.model_input_names and not TYPE_IDS:
            arguments["fps"] = [film.rate * len(film.indices) / film.total for film in films]
        return arguments

    def _check_room(self, tokens: int, what: str) -> None:
        if tokens > self._max_prompt_tokens:
            raise UserError(
                f"{what} {tokens} tokens, and at most {self._max_prompt_tokens} fit; shorten the prompt, or lower "
                "max_pixels, processor.fps or processor.max_frames"
            )

    def _check_places(self, tensors: dict[str, torch.Tensor]) -> None:
        """Every patch that the model will put into the prompt needs its token there, and no token may be over."""
        for kind, token in self._places.items():
            grid = tensors.get(f"{kind}_grid_thw")
            need = 0 if grid is None else int(grid.prod(-1).sum()) // self._processor.image_processor.merge_size**2
            have = int((tensors["input_ids"] == token).sum())
            if have != need:
                raise UserError(f"the chat template left {have} {kind} tokens in the prompt where {need} are needed")


def collate(prepared: Sequence[Prepared], pad_token_id: int) -> dict[str, torch.Tensor]:
    """One batch: [1, S] tensors padded on the left to [B, longest S], all others concatenated along dim 0, in order."""
    longest = max(item.prompt_tokens for item in prepared)
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}
    batch: dict[str, torch.Tensor] = {}
    for key in dict.fromkeys(key for item in prepared for key in item.tensors):
        tensors = [item.tensors[key] for item in prepared if key in item.tensors]
        if key in fill:
            tensors = [torch.nn.functional.pad(t, (longest - t.shape[1], 0), value=fill[key]) for t in tensors]
        batch[key] = torch.cat(tensors)
    return batch


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


def _tokens(part: Any, frames: int, height: int, width: int) -> int:
    """How many tokens a picture or film takes, known before its pixels are worked on."""
    new_height, new_width = _resized(part, height, width)
    if count := getattr(part, "get_num_of_video_patches", None):
        return int(count(frames, height, width, {})) // part.merge_size**2
    cells = new_height * new_width // (part.patch_size * part.merge_size) ** 2
    return math.ceil(frames / part.temporal_patch_size) * cells


def _film_part(processor: Any) -> Any:
    """What handles films: before 4.5x that is the image processor."""
    return getattr(processor, "video_processor", processor.image_processor)


def _media(turns: Turns, wanted: str) -> Iterator[Any]:
    return (value for _, parts in turns for kind, value in parts if kind == wanted)


def _check_texts(turns: Turns, reserved: Iterable[str]) -> None:
    """Special tokens are the chat template's to write: from a user they would open turns or take pictures' places."""
    texts = [(role, "".join(value for kind, value in parts if kind == "text")) for role, parts in turns]
    if not any(text.strip() for role, text in texts if role == "user"):
        raise UserError("the prompt is empty; it needs words, also beside a picture")
    for token in reserved:
        if any(token in text for _, text in texts):
            raise UserError(f"the text contains {token!r}, which has a meaning of its own to the model; take it out")


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
    path = Path(value)
    if not path.is_file():
        raise UserError(f"{kind} {value}: {'not a regular file' if path.exists() else 'no such file'}")
    if not path.stat().st_size:
        raise UserError(f"{kind} {value}: the file is empty")
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{kind} {value}: {error.strerror}") from None


def _shown(value: str) -> str:
    return value if len(value) <= 200 else f"{value[:40]}... ({len(value)} characters)"


def _as_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float32)


def _eos_token_ids(model_dir: Path, default: int) -> tuple[int, ...]:
    """Where generation ends: generation_config.json says, else the tokenizer."""
    path = model_dir / "generation_config.json"
    stated = json.loads(path.read_text()).get("eos_token_id", default) if path.exists() else default
    return tuple(stated) if isinstance(stated, list) else (stated,)
