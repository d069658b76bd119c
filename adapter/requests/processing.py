"""Prompts, images and videos -> the tensors the model takes; what is wrong with one request stays with that request.

    processor = RequestProcessor(config.model.path, config.processor, max_prompt_tokens=4096)
    batch = collate([processor.prepare(request) for request in requests], processor.pad_token_id)

Only local files and base64 data: URLs are read; nothing is fetched and no code of a checkpoint is run. Whether there is
room for an image or video is decided by its header. Each image is brought to the size that the model sees as it is
read, and of a video only the frames that it sees are kept, so that one image at a time is held at its full size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import AutoProcessor

from adapter.checkpoint.safetensors import read_config
from adapter.config.schema import Processor, Request
from adapter.requests import media
from adapter.requests.media import Video
from policies.errors import UserError

CUT_HERE = "<<the text goes on here>>"  # stands at the end of a message that is to be continued, while it is rendered
TYPE_IDS = Version(transformers.__version__).major >= 5  # from then on rotary positions need mm_token_type_ids

MOST_HELD = 4 * media.MOST_PIXELS  # pixels of all images and frames of a request as they are held: 1 GB

Turns = list[tuple[str, list[tuple[str, Any]]]]  # [(role, [(kind, value)])], kind being text, image or video


class RequestError(UserError):
    """One request cannot be run; the others can. `reason` is the message without the request's id."""

    def __init__(self, request_id: str, reason: str) -> None:
        super().__init__(f"request {request_id!r}: {reason}")
        self.request_id, self.reason = request_id, reason


@dataclass(frozen=True)
class Prepared:
    """One request, ready for the model.

    tensors: input_ids, attention_mask and with Transformers 5 mm_token_type_ids (0 text, 1 image, 2 video), int64
    [1, S]; with images pixel_values, float32 [patches, features], and image_grid_thw, int64 [images, 3]; with videos
    pixel_values_videos and video_grid_thw alike; and whatever else the family's processor returns.
    """

    id: str
    tensors: dict[str, torch.Tensor]
    prompt_tokens: int
    continued: bool = False  # the answer goes on where the last message, the assistant's, ends


@dataclass
class _Room:
    """What the images and videos of a request take: tokens of the prompt, and pixels as they are held."""

    most_tokens: int
    tokens: int = 0
    pixels: int = 0

    def take(self, part: Any, frames: int, height: int, width: int, what: str) -> None:
        """Count so many frames of that size; 1 for an image. Raises UserError where they are too many."""
        self.tokens += media.tokens(part, frames, height, width)
        self.check(self.tokens, what)
        self.pixels += frames * math.prod(media.kept_size(part, frames, height, width))
        if self.pixels > MOST_HELD:
            raise UserError(
                f"its images and frames have {self.pixels} pixels or more, {MOST_HELD} are allowed together where "
                "min_pixels is too near to max_pixels to shrink them as they are read; lower min_pixels, or lower "
                "max_frames"
            )

    def check(self, tokens: int, what: str) -> None:
        """Raises UserError where the prompt has more than `most_tokens`."""
        if tokens > self.most_tokens:
            raise UserError(
                f"{what} {tokens} tokens, and at most {self.most_tokens} fit; shorten the prompt, or lower "
                "max_pixels, processor.fps or processor.max_frames"
            )


class RequestProcessor:
    """The checkpoint's own processor and tokenizer, with a user's limits. Raises UserError if they do not work."""

    def __init__(self, model_dir: str | Path, section: Processor, max_prompt_tokens: int) -> None:
        self._section, self._max_prompt_tokens = section, max_prompt_tokens
        try:
            self._processor = AutoProcessor.from_pretrained(
                str(model_dir), local_files_only=True, trust_remote_code=False
            )
            words = {"image": self._processor.image_token, "video": self._processor.video_token}
            self._pads = {k: self._processor.tokenizer.convert_tokens_to_ids(word) for k, word in words.items()}
            if not self._processor.tokenizer.encode("?") or not self._render([("user", [("text", "?")])]):
                raise ValueError("the vocabulary or the chat template is empty")
            _check_tokens(read_config(Path(model_dir)), self._pads)
        except Exception as error:
            raise UserError(
                f"{model_dir}: its processor, tokenizer or chat template cannot be used: {error}; the directory needs "
                "preprocessor_config.json, tokenizer.json, tokenizer_config.json and a chat template"
            ) from error
        tokenizer = self._processor.tokenizer
        specials = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._reserved = [*specials, "<|placeholder|>"]  # older releases expand the last to the positions of images
        self.pad_token_id: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def prepare(self, request: Request) -> Prepared:
        """Make the tensors of one request. Raises RequestError for anything that is wrong with it."""
        try:
            return self._prepare(request)
        except MemoryError:
            why = "it needs more memory than there is; lower max_pixels or max_frames"
            raise RequestError(request.id, why) from None
        except UserError as error:
            raise RequestError(request.id, str(error)) from error
        except Exception as error:  # whatever a library finds wrong with the input
            raise RequestError(request.id, f"cannot be prepared: {type(error).__name__}: {error}") from error

    def decode(self, token_ids: Iterable[int], continued: bool = False) -> str:
        """Return the text of new tokens, special ones left out; of a continued message with the spaces around it."""
        text: str = self._processor.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text if continued else text.strip()

    def _prepare(self, request: Request) -> Prepared:
        turns = request.turns()
        _check_texts(turns, self._reserved)
        processor = self._with_limits(request)
        room = _Room(self._max_prompt_tokens)
        images = self._load_images(turns, processor.image_processor, room)
        videos = [self._load_video(value, processor, room) for value in _media(turns, "video")]
        inputs = processor(
            text=[self._render(turns)], images=images or None, return_tensors="pt", **self._video_arguments(videos)
        )
        tensors = {key: _as_tensor(value) for key, value in inputs.items() if key != "video_metadata"}
        ids = tensors["input_ids"]
        room.check(ids.shape[1], "the prompt has")
        self._check_pads(tensors)
        if TYPE_IDS:
            kinds = enumerate((self._pads["image"], self._pads["video"]), start=1)
            tensors["mm_token_type_ids"] = sum((type_id * (ids == token).long() for type_id, token in kinds), 0 * ids)
        return Prepared(request.id, tensors, ids.shape[1], turns[-1][0] == "assistant")

    def _render(self, turns: Turns) -> str:
        """Return the chat template's text. Images and videos are placeholders in it, so that it loads nothing.

        A last turn of the assistant's is left open, for the model to continue it. Raises UserError where that turn
        ends with anything but text.
        """
        continued = turns[-1][0] == "assistant"
        if continued:
            (role, parts), turns = turns[-1], turns[:-1]
            if parts[-1][0] != "text":
                raise UserError(f"the last message is the assistant's and ends with {parts[-1][0]}; only text can be "
                                "continued")
            turns = [*turns, (role, [*parts[:-1], ("text", parts[-1][1] + CUT_HERE)])]

        def part(kind: str, value: Any) -> dict[str, Any]:
            return {"type": kind, "text": value} if kind == "text" else {"type": kind}

        chat = [{"role": role, "content": [part(*stated) for stated in parts]} for role, parts in turns]
        text = str(self._processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=not continued))
        if not continued:
            return text
        if CUT_HERE not in text:
            raise UserError("the chat template leaves out the last message, the assistant's, so it cannot be continued")
        return text[: text.rindex(CUT_HERE)]

    def _with_limits(self, request: Request) -> Any:
        """Return the processor with the pixel limits of a request: its own, else the section's, else the checkpoint's.

        The arguments of a call that set them change with the releases (4.49 takes none, 5 wants `size`), the attributes
        that hold them hardly: `size` always, and also `min_pixels` and `max_pixels` where a release has these.
        """
        processor = copy.copy(self._processor)
        for name in {"image_processor", "video_processor"} & vars(processor).keys():
            part = copy.copy(getattr(processor, name))
            if media.limits_whole_videos(part):
                continue  # a limit for an image would leave a video nearly nothing: the checkpoint's own stands
            low = request.min_pixels or self._section.min_pixels or part.size["shortest_edge"]
            high = request.max_pixels or self._section.max_pixels or part.size["longest_edge"]
            if low > high:
                raise UserError(
                    f"min_pixels = {low} is above max_pixels = {high}, as the request, the processor section and the "
                    "checkpoint have them together; state both"
                )
            part.size = type(part.size)(shortest_edge=low, longest_edge=high)
            for key, value in (("min_pixels", low), ("max_pixels", high), ("cap_pixels_per_frame", False)):
                if hasattr(part, key):  # the cap is 5.23's own limit on videos, without which all releases agree
                    setattr(part, key, value)
            setattr(processor, name, part)
        return processor

    def _load_images(self, turns: Turns, part: Any, room: _Room) -> list[Image.Image]:
        """Return the request's images in their order, each read once and shrunk at once."""
        values = list(_media(turns, "image"))
        for value in values:
            room.take(part, 1, *media.image_size(value), "the images alone take at least")
        loaded = {value: media.shrunk(media.load_image(value), part) for value in dict.fromkeys(values)}
        return [loaded[value] for value in values]

    def _load_video(self, value: str | tuple[str, ...], processor: Any, room: _Room) -> Video:
        part = _video_processor(processor)

        def check(frames: int, height: int, width: int) -> None:
            what = f"with a video of {frames} frames of {width} x {height} it has at least"
            copy.copy(room).take(part, frames, height, width, what)

        load = media.video_of_images if isinstance(value, tuple) else media.video_of_file
        video = load(value, part, self._section, check)  # type: ignore[arg-type]
        frames, height, width, _ = video.frames.shape
        room.take(part, frames, height, width, "the images and videos alone take at least")
        return video

    def _video_arguments(self, videos: Sequence[Video]) -> dict[str, Any]:
        """Return what the processor needs to know of videos: they are sampled already, and when their frames were."""
        arguments: dict[str, Any] = {"videos": [video.frames for video in videos]} if videos else {}
        if videos and hasattr(self._processor, "video_processor"):
            arguments["do_sample_frames"] = False
            arguments["video_metadata"] = [
                {"fps": video.rate, "total_num_frames": video.total, "frames_indices": video.indices}
                for video in videos
            ]
        if videos and "second_per_grid_ts" in self._processor.model_input_names and not TYPE_IDS:
            arguments["fps"] = [video.rate * len(video.indices) / video.total for video in videos]
        return arguments

    def _check_pads(self, tensors: dict[str, torch.Tensor]) -> None:
        """Every patch that the model will put into the prompt needs its token there, and no token may be over."""
        for kind, token in self._pads.items():
            grid = tensors.get(f"{kind}_grid_thw")
            need = 0 if grid is None else int(grid.prod(-1).sum()) // self._processor.image_processor.merge_size**2
            have = int((tensors["input_ids"] == token).sum())
            if have != need:
                raise UserError(f"the chat template left {have} {kind} tokens in the prompt where {need} are needed")


def collate(prepared: Sequence[Prepared], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Make one batch: [1, S] tensors padded on the left to [B, longest S], all others concatenated along dim 0."""
    longest = max(item.prompt_tokens for item in prepared)
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}
    batch: dict[str, torch.Tensor] = {}
    for key in dict.fromkeys(key for item in prepared for key in item.tensors):
        tensors = [item.tensors[key] for item in prepared if key in item.tensors]
        if key in fill:
            tensors = [torch.nn.functional.pad(t, (longest - t.shape[1], 0), value=fill[key]) for t in tensors]
        batch[key] = torch.cat(tensors)
    return batch


def _check_tokens(config: Mapping[str, Any], pads: Mapping[str, int]) -> None:
    """Tokenizer and model must mean the same token by an image; else the first forward fails, on every rank."""
    for kind, token in pads.items():
        stated = config.get(f"{kind}_token_id", token)
        if stated != token:
            raise ValueError(f"config.json: {kind}_token_id is {stated}, and the tokenizer has {token} for it")


def _video_processor(processor: Any) -> Any:
    """What handles videos: before 4.5x that is the image processor."""
    return getattr(processor, "video_processor", processor.image_processor)


def _media(turns: Turns, wanted: str) -> Iterator[Any]:
    return (value for _, parts in turns for kind, value in parts if kind == wanted)


def _check_texts(turns: Turns, reserved: Iterable[str]) -> None:
    """Special tokens are the chat template's to write: from a user they would open turns, or stand for images."""
    texts = [(role, "".join(value for kind, value in parts if kind == "text")) for role, parts in turns]
    if not any(text.strip() for role, text in texts if role == "user"):
        raise UserError("the prompt is empty; it needs words, also beside an image")
    for token in reserved:
        if any(token in text for _, text in texts):
            raise UserError(f"the text contains {token!r}, which has a meaning of its own to the model; take it out")


def _as_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float32)
