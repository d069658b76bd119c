"""The YAML schema: strict, typed, frozen. Nothing is coerced ("4" is not 4, 1 is not true), nothing unknown dropped.

`adapter.config.load` reads files into it and words what does not fit. Validation context: what relative paths are
relative to, under "model", "weights", "requests" and "output".
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


def _directory(value: Any, info: ValidationInfo, *, key: str = "model.path") -> Any:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("the directory of a checkpoint is needed")
    path = absolute(value, _base(info, key.split(".")[0]))
    if os.path.isdir(path):  # unlike Path.is_dir it has an answer to every path, one that is too long included
        return path
    advice = "the directory of a checkpoint is needed"
    if HUB_ID.fullmatch(value):
        name = value.split("/")[1]
        get = f"`huggingface-cli download {value} --local-dir {name}` (newer: `hf download`)"
        advice = f"it looks like a hub id, and nothing is downloaded here: run {get}, then {key}={name}"
    raise ValueError(f"{'not a directory' if os.path.exists(path) else 'no such directory'}: {path}; {advice}")


def _original(value: Any, info: ValidationInfo) -> Any:
    return None if value is None else _directory(value, info, key="weights.original")


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
Film = Annotated[
    Annotated[Media, Tag("<file>")] | Annotated[Frames, Tag("<frames>")],
    Discriminator(lambda value: "<frames>" if isinstance(value, list | tuple) else "<file>"),
]


class Section(BaseModel):
    """What every mapping of the schema has in common."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Pixels(Section):
    """How many pixels a picture, or each frame of a film, has after resizing; None: as the checkpoint says."""

    min_pixels: Count | None = None
    max_pixels: Count | None = None

    @check("max_pixels")
    @classmethod
    def _ordered(cls, high: int | None, info: ValidationInfo) -> int | None:
        low = info.data.get("min_pixels")
        if low is not None and high is not None and low > high:
            raise ValueError(f"max_pixels must not be below min_pixels = {low}")
        return high


class ImageUrl(Section):
    url: Media
    detail: str = "auto"


class Part(Section):
    """A piece of a message: text, a picture or a film, in the words of Transformers or of OpenAI."""

    text: str | None = None
    image: Media | None = None
    video: Film | None = None
    image_url: ImageUrl | None = None
    type: Literal["text", "image", "video", "image_url"]

    @check("type")
    @classmethod
    def _one(cls, kind: str, info: ValidationInfo) -> str:
        stated = [key for key, value in info.data.items() if value is not None]
        if stated != [kind] and kind in info.data:
            raise ValueError(f"exactly the key {kind!r} must go with it, here: {stated or 'none'}")
        return kind


class Message(Section):
    role: Literal["system", "user", "assistant"]
    content: Annotated[
        tuple[Part, ...],
        BeforeValidator(lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value),
        AfterValidator(_not_empty),
        Listed,
    ]


Ids = Annotated[
    list[Natural], BeforeValidator(lambda value: [value] if isinstance(value, int) else value), Field(min_length=1)
]
Chat = Annotated[tuple[Message, ...], Listed, AfterValidator(_not_empty)]


class Request(Pixels):
    """One question: a `prompt` with its pictures and films, or a whole chat as `messages`."""

    id: Text
    prompt: str | None = None
    images: Annotated[tuple[Media, ...], Listed] = ()
    videos: Annotated[tuple[Film, ...], Listed] = ()
    system: str | None = None
    expected: str | None = None
    messages: Chat | None = Field(None, validate_default=True)

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
    path: Annotated[Path, BeforeValidator(_directory)]
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class TensorParallelSection(Section):
    tp_size: Count = 4
    vision: Literal["tensor", "data", "auto"] = "tensor"  # see planning/vision_balance.py
    desync_check: Annotated[int, Field(ge=0)] = 0  # compare the ranks every that many steps of generate; 0: never
    self_test: bool = True  # one attention and one MLP of each encoder against the formula before anything is served


class Weights(Section):
    format: Literal["dense", "int8", "int4"] = "dense"  # of the text encoder; policies/formats.py says of what
    original: Annotated[Path | None, BeforeValidator(_original)] = None  # the model that shards in model.path are of


class Processor(Pixels):
    fps: Annotated[float, Field(gt=0)] = 2.0  # frames taken from a second of film
    max_frames: Annotated[int, Field(ge=2)] = 768


class Generation(Section):
    """The types of GenerationConfig's common names. Transformers itself looks at the others."""

    model_config = ConfigDict(extra="allow")
    max_new_tokens: Count = 1
    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k: Natural = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    num_beams: Annotated[int, Field(ge=1, le=1024)] = 1  # each holds a KV cache of its own
    eos_token_id: Ids = [0]
    pad_token_id: Natural | None = None
    bos_token_id: Natural | None = None
    min_length: Natural | None = None
    min_new_tokens: Natural | None = None
    early_stopping: bool | Literal["never"] | None = None
    use_cache: bool | None = None
    min_p: Fraction | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    epsilon_cutoff: Fraction | None = None
    eta_cutoff: Fraction | None = None
    encoder_repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    length_penalty: float | None = None
    no_repeat_ngram_size: Natural | None = None
    encoder_no_repeat_ngram_size: Natural | None = None
    bad_words_ids: Annotated[list[Annotated[list[Natural], Field(min_length=1)]], Field(min_length=1)] | None = None
    suppress_tokens: list[Natural] | None = None
    begin_suppress_tokens: list[Natural] | None = None
    forced_bos_token_id: Natural | None = None
    forced_eos_token_id: Ids | None = None
    exponential_decay_length_penalty: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    renormalize_logits: bool | None = None
    remove_invalid_values: bool | None = None
    guidance_scale: Annotated[float, Field(gt=0)] | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None


class Config(Section):
    """The whole file. `deepspeed` is for DeepSpeedInferenceConfig, `generation` for GenerationConfig, as they stand."""

    model: Model
    tensor_parallel: TensorParallelSection = TensorParallelSection()
    deepspeed: dict[str, Any] = {}
    weights: Weights = Weights()
    processor: Processor = Processor()
    generation: dict[str, Any] = {}
    requests: Annotated[tuple[Request, ...], Listed] = ()
    output: Annotated[Path | None, BeforeValidator(_output)] = None  # JSON lines, resumable; None: stdout
    batch_size: Count = 8
