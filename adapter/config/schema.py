"""The YAML schema: strict, typed, frozen. Nothing is coerced ("4" is not 4, 1 is not true), nothing unknown dropped.

`adapter.config.load` reads files into it and words what does not fit; `json_schema` prints it for editors. Validation
context: what relative paths are relative to, under "model", "adapters", "weights", "requests" and "output".
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import unquote, urlparse

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    create_model,
)
from pydantic import field_validator as check

if TYPE_CHECKING:
    import torch

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
URL = re.compile(r"data:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def _base(info: ValidationInfo, key: str) -> Path:
    return Path((info.context or {}).get(key, "."))


def absolute(path: str, base: Path) -> Path:
    return Path(os.path.abspath(base / os.path.expanduser(path)))


def _media(value: Any, info: ValidationInfo) -> Any:
    """A path is made absolute. A URL stays as it is: which may be read is decided where it is read, per request."""
    if isinstance(value, str) and value.startswith("file://"):
        value = unquote(urlparse(value).path)
    is_path = isinstance(value, str) and value.strip() and not URL.match(value)
    return str(absolute(value, _base(info, "requests"))) if is_path else value


def _directory(value: Any, info: ValidationInfo, *, key: str = "model", what: str = "a checkpoint") -> Any:
    """Make a directory's path absolute. A hub id stays relative, unless there is a directory of that name."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the directory of {what} is needed, or a hub id")
    path = absolute(value, _base(info, key))
    if os.path.isdir(path):  # unlike Path.is_dir it has an answer to every path, one that is too long included
        return path
    if os.path.exists(path):
        raise ValueError(f"not a directory: {path}; name the directory that it is in")
    if HUB_ID.fullmatch(value):
        return Path(value)
    raise ValueError(f"no such directory: {path}; the directory of {what} is needed, or a hub id")


def _original(value: Any, info: ValidationInfo) -> Any:
    return None if value is None else _directory(value, info, key="weights")


def _adapter(value: Any, info: ValidationInfo) -> Any:
    return _directory(value, info, key="adapters", what="a LoRA adapter")


def _different(adapters: tuple[Path, ...]) -> tuple[Path, ...]:
    places = [os.path.realpath(path) if path.is_absolute() else str(path) for path in adapters]
    if twice := [str(path) for path, place in zip(adapters, places, strict=True) if places.count(place) > 1]:
        raise ValueError(f"the same adapter twice: {' and '.join(twice)}; each is applied once")
    return adapters


def _output(value: Any, info: ValidationInfo) -> Any:
    """Whether it can be written is seen where it is, on rank 0."""
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise ValueError("the path of a file is needed")
    return value and absolute(value, _base(info, "output"))


def _not_empty(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if not value:
        raise ValueError("at least one item is needed")
    return value


LARGEST = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Listed = Field(strict=False)  # a YAML list fills a tuple; its items stay strict
Media = Annotated[str, BeforeValidator(_media), Field(min_length=1)]
Frames = Annotated[tuple[Media, ...], Listed, AfterValidator(_not_empty)]
Clip = Annotated[
    Annotated[Media, Tag("<file>")] | Annotated[Frames, Tag("<frames>")],
    Discriminator(lambda value: "<frames>" if isinstance(value, list | tuple) else "<file>"),
]


class Section(BaseModel):
    """What every mapping of the schema has in common."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Pixels(Section):
    """How many pixels an image, or each frame of a video, has after resizing; null: as the checkpoint says."""

    min_pixels: Count | None = Field(default=None, description="An image of fewer pixels is enlarged to this many.")
    max_pixels: Count | None = Field(default=None, description="An image of more pixels is shrunk to this many.")

    @check("max_pixels")
    @classmethod
    def _ordered(cls, high: int | None, info: ValidationInfo) -> int | None:
        low = info.data.get("min_pixels")
        if low is not None and high is not None and low > high:
            raise ValueError(f"max_pixels must not be below min_pixels = {low}")
        return high


class ImageUrl(Section):
    """An image in OpenAI's words."""

    url: Media = Field(description="A path, file://, or data: with base64; nothing is downloaded.")
    detail: str = Field(default="auto", description="Accepted and not used; max_pixels decides.")


class Part(Section):
    """A piece of a message: text, an image or a video, in the words of Transformers or of OpenAI."""

    text: str | None = None
    image: Media | None = Field(default=None, description="A path, file://, or data: with base64.")
    video: Clip | None = Field(default=None, description="A video file, or a list of images as its frames.")
    image_url: ImageUrl | None = None
    type: Literal["text", "image", "video", "image_url"] = Field(description="Which of the keys the part has.")

    @check("type")
    @classmethod
    def _one(cls, kind: str, info: ValidationInfo) -> str:
        stated = [key for key, value in info.data.items() if value is not None]
        if stated != [kind] and kind in info.data:
            raise ValueError(f"exactly the key {kind!r} must go with it, here: {stated or 'none'}")
        return kind


class Message(Section):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        tuple[Part, ...],
        BeforeValidator(lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value),
        AfterValidator(_not_empty),
        Listed,
    ] = Field(description="A text, or a list of parts.")


Ids = Annotated[
    list[Natural], BeforeValidator(lambda value: [value] if isinstance(value, int) else value), Field(min_length=1)
]
Chat = Annotated[tuple[Message, ...], Listed, AfterValidator(_not_empty)]


class Request(Pixels):
    """One question: a `prompt` with its images and videos, or a whole chat as `messages`."""

    id: Text = Field(description="What its answer is named by; default: its position, from 1.")
    prompt: str | None = Field(default=None, description="The question; either this or messages.")
    images: Annotated[tuple[Media, ...], Listed] = Field(default=(), description="Image files, put before the text.")
    videos: Annotated[tuple[Clip, ...], Listed] = Field(default=(), description="Video files, or lists of frames.")
    system: str | None = Field(default=None, description="The system turn of a prompt.")
    expected: str | None = Field(default=None, description="The right answer; with another one the exit code is 1.")
    messages: Chat | None = Field(default=None, validate_default=True, description="A chat; either this or prompt.")

    @check("messages")
    @classmethod
    def _one_form(cls, chat: tuple[Message, ...] | None, info: ValidationInfo) -> tuple[Message, ...] | None:
        if "prompt" in info.data and (chat is None) == (info.data["prompt"] is None):
            raise ValueError("exactly one of prompt and messages must be given")
        if stray := [key for key in ("images", "videos", "system") if chat is not None and info.data.get(key)]:
            raise ValueError(f"{', '.join(stray)} go with prompt; in messages they are parts of the content")
        return chat

    def turns(self) -> list[tuple[str, list[tuple[str, Any]]]]:
        """[(role, [(kind, value)])], kind being text, image or video, however it was stated; a prompt comes last."""
        if self.messages is None:
            media = [("image", image) for image in self.images] + [("video", video) for video in self.videos]
            system = [] if self.system is None else [("system", [("text", self.system)])]
            return [*system, ("user", [*media, ("text", self.prompt)])]
        return [(turn.role, [_kind_and_value(part) for part in turn.content]) for turn in self.messages]


def _kind_and_value(part: Part) -> tuple[str, Any]:
    return ("image", part.image_url.url) if part.image_url else (part.type, getattr(part, part.type))


class Model(Section):
    """Which checkpoint, and how it computes."""

    path: Annotated[Path, BeforeValidator(_directory)] = Field(
        description="A directory (relative to this file), or a hub id such as Qwen/Qwen2-VL-7B-Instruct.")
    revision: Text | None = Field(default=None, description="Branch, tag or commit of a hub id; default: main.")
    adapters: Annotated[tuple[Annotated[Path, BeforeValidator(_adapter)], ...], Listed, AfterValidator(_different)] = \
        Field(default=(), description="LoRA adapters of PEFT to merge, in order: directories, or hub ids.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="bfloat16", description="Of weights, activations.")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        default="sdpa", description="As in Transformers; flash_attention_2 needs a GPU, flash-attn, half precision.")

    @check("revision")
    @classmethod
    def _of_a_hub_id(cls, revision: str | None, info: ValidationInfo) -> str | None:
        return _hub_only(revision, info.data.get("path"))

    @check("attn_implementation")
    @classmethod
    def _in_half_precision(cls, attention: str, info: ValidationInfo) -> str:
        if attention == "flash_attention_2" and info.data.get("dtype") == "float32":
            raise ValueError("it computes in half precision only: set model.dtype to bfloat16 or float16, or "
                             "model.attn_implementation to sdpa")
        return attention

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def _hub_only(revision: str | None, path: Path | None) -> str | None:
    if revision is not None and path is not None and path.is_absolute():
        raise ValueError(f"only a hub id has revisions, and {path} is a directory")
    return revision


class TensorParallelSection(Section):
    """How the model is split."""

    tp_size: Count = Field(default=4, description="Ranks of one replica; the plan lists what a model can have.")
    vision: Literal["tensor", "data", "auto"] = Field(
        default="tensor", description="tensor: the vision encoder is split; data: each rank holds it whole and encodes "
        "its share of the images; auto: whichever is estimated to be faster.")
    experts: Literal["tensor", "expert"] = Field(
        default="tensor", description="A mixture of experts: tensor: each rank holds a part of each; expert: it holds "
        "whole ones.")
    desync_check: Annotated[int, Field(ge=0, le=10_000)] = Field(
        default=0, description="Compare the ranks every that many steps of generate; 0: never.")
    heartbeat_s: Annotated[int, Field(ge=0, le=86_400)] = Field(
        default=30, description="End when another host has been silent for so many seconds; 0: never.")
    self_test: bool = Field(
        default=True, description="Test one attention and one MLP of each encoder against one process before serving.")


class Weights(Section):
    """In what form weights are held."""

    format: Literal["dense", "int8", "int4"] = Field(default="dense", description="Of the text layers' linear weights.")
    original: Annotated[Path | None, BeforeValidator(_original)] = Field(
        default=None, description="Where model.path has shards: the model that they were made from, as path.")
    original_revision: Text | None = Field(default=None, description="Branch, tag or commit, for a hub id.")

    @check("original_revision")
    @classmethod
    def _of_a_hub_id(cls, revision: str | None, info: ValidationInfo) -> str | None:
        return _hub_only(revision, info.data.get("original"))


class Processor(Pixels):
    """How images and videos become patches; a request's own min_pixels and max_pixels come first."""

    fps: Annotated[float, Field(gt=0)] = Field(default=2.0, description="Frames taken from a second of video.")
    max_frames: Annotated[int, Field(ge=2)] = Field(default=768, description="The most frames taken from one video.")


Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Beams = Annotated[int, Field(ge=1, le=1024)]  # each holds a KV cache of its own
GENERATION = {  # what GenerationConfig.validate does not look at, and what would fail in the middle of a job
    bool: "do_sample use_cache renormalize_logits remove_invalid_values output_scores output_logits output_attentions "
          "output_hidden_states",
    Count: "max_new_tokens",
    Beams: "num_beams",
    Natural: "top_k min_length min_new_tokens no_repeat_ngram_size encoder_no_repeat_ngram_size pad_token_id "
             "bos_token_id forced_bos_token_id",
    Positive: "temperature repetition_penalty encoder_repetition_penalty guidance_scale",
    Share: "top_p typical_p",
    Fraction: "min_p epsilon_cutoff eta_cutoff",
    float: "length_penalty",
    Ids: "eos_token_id forced_eos_token_id",
    list[Natural]: "suppress_tokens begin_suppress_tokens",
    list[Annotated[list[Natural], Field(min_length=1)]]: "bad_words_ids",
}


class _Open(Section):
    """The types of GenerationConfig's common names. Transformers itself looks at the others."""

    model_config = ConfigDict(extra="allow")


Generation = create_model("Generation", __base__=_Open, **{
    name: (kind | None, None) for kind, names in GENERATION.items() for name in names.split()})  # type: ignore


class Config(Section):
    """A job of qwenvl-tp: a model, how it is split, and what it is asked."""

    model: Model
    tensor_parallel: TensorParallelSection = TensorParallelSection()
    deepspeed: dict[str, Any] = Field(default={}, description="Passed on to DeepSpeedInferenceConfig as it stands.")
    weights: Weights = Weights()
    processor: Processor = Processor()
    generation: dict[str, Any] = Field(default={}, description="Names of Transformers' GenerationConfig.")
    requests: Annotated[tuple[Request, ...], Listed] = Field(
        default=(), description="Questions, or the path of a JSON-lines file with one on each line.")
    output: Annotated[Path | None, BeforeValidator(_output)] = Field(
        default=None, description="A JSON-lines file for the answers; a stopped job goes on there. Default: stdout.")
    batch_size: Count = Field(default=8, description="Requests answered at once by a replica.")
