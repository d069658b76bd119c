"""What an answer depends on, as a digest beside it in the output file; a resumed job takes a row only if it is equal.

Everything that can change a token is in it: the request and its media files, the generation section, the checkpoint
with its processor files, the adapters in their order, dtype, weights.format, the attention and the context limit. What
only changes how the work is done is not: tp_size, tensor_parallel.vision, batch_size, replicas. Those leave float32
answers equal and may flip a near-tie in bfloat16, as they may within one job.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapter.checkpoint.safetensors import TensorInfo, read_header
from adapter.checkpoint.sharded import MANIFEST
from adapter.config.files import open_regular
from adapter.config.schema import Config, Request

VERSION = 2  # of what is digested. The first had no number: 16 hexadecimal digits alone
PATTERNS = (  # small files of a model directory that decide what the model, its processor or generate does
    "*config.json", "*.index.json", "tokenizer.*", "tokenizer_*.json", "vocab.*", "merges.txt", "chat_template*",
    "additional_chat_templates/*", "special_tokens_map.json", "added_tokens.json", MANIFEST,
)
SAMPLE_BYTES = 4096  # read at the start, the middle and the end of each tensor: a training step changes all of it
SAME_ANSWERS = ("enable_cuda_graph",)  # keys of the deepspeed section that change no token


def digests(config: Config) -> dict[str, str]:
    """Return request id -> "VERSION-digest" for every request of the config."""
    settings = [VERSION, _settings(config), checkpoint(config.model.path), *map(checkpoint, config.model.adapters)]
    return {r.id: f"{VERSION}-{_hash([*settings, _request(r)])}" for r in config.requests}


def version_of(digest: Any) -> int | None:
    """Return the format version of a row's digest; None where it is none of ours."""
    if not isinstance(digest, str):
        return None
    if len(digest) == 16 and all(c in "0123456789abcdef" for c in digest):
        return 1
    version, dash, rest = digest.partition("-")
    return int(version) if dash and version.isdecimal() and len(rest) == 16 else None


def stated_limit(config: Config) -> Any:
    """Return max_out_tokens of the deepspeed section, under either of DeepSpeed's two names; None if unstated."""
    return config.deepspeed.get("max_out_tokens", config.deepspeed.get("max_tokens"))


def _settings(config: Config) -> dict[str, Any]:
    deepspeed = {k: v for k, v in config.deepspeed.items() if k not in (*SAME_ANSWERS, "max_out_tokens", "max_tokens")}
    return {
        "dtype": config.model.dtype, "attention": config.model.attn_implementation, "format": config.weights.format,
        "deepspeed": deepspeed, "limit": stated_limit(config), "generation": config.generation,
        "processor": config.processor.model_dump(),
    }


def _request(request: Request) -> list[Any]:
    """The request as stated, and size and time of change of every media file that it names."""
    media: list[str] = []
    for _, parts in request.turns():
        for kind, value in parts:
            if kind != "text":
                media += [value] if isinstance(value, str) else value
    return [request.model_dump(mode="json", exclude={"expected"}), [_file_facts(path) for path in media]]


def _file_facts(path: str) -> list[int] | None:
    """[bytes, nanoseconds of the last change]; None for a data: URL, which the request itself holds, or no file."""
    try:
        facts = None if path.startswith("data:") else os.stat(path)
    except (OSError, ValueError):
        return None
    return facts and [facts.st_size, facts.st_mtime_ns]


def checkpoint(directory: Path) -> str:
    """Digest of a model directory: its small files whole, its weights by header, size and samples of every tensor.

    The directory's own name and place are not in it, so a copy is the same checkpoint. Shards of ranks are known by
    their manifest, which holds a digest of each file.
    """
    hasher = hashlib.blake2b(digest_size=16)
    for file in sorted({path for pattern in PATTERNS for path in directory.glob(pattern)}):
        hasher.update(_hash([file.name, _content(file)]).encode())
    if not (directory / MANIFEST).exists():
        for file in sorted(directory.glob("*.safetensors")):
            tensors = sorted(read_header(file, []) or [], key=lambda info: info.offset)
            hasher.update(_hash([file.name, [_sampled(info) for info in tensors]]).encode())
    return hasher.hexdigest()


def _content(file: Path) -> str | None:
    try:
        with open_regular(file) as stream:
            return hashlib.blake2b(stream.read(), digest_size=16).hexdigest()
    except OSError:
        return None  # whoever needs it says what is wrong with it


def _sampled(info: TensorInfo) -> list[Any]:
    """Name, dtype, shape and a digest of the samples of one tensor."""
    hasher = hashlib.blake2b(digest_size=16)
    with open_regular(info.file) as stream:
        for start in _sample_starts(info.nbytes):
            hasher.update(os.pread(stream.fileno(), min(SAMPLE_BYTES, info.nbytes), info.offset + start))
    return [info.name, info.dtype, info.shape, hasher.hexdigest()]


def _sample_starts(nbytes: int) -> Iterator[int]:
    last = max(nbytes - SAMPLE_BYTES, 0)
    yield from sorted({0, last // 2, last})


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=repr).encode(), digest_size=8).hexdigest()
