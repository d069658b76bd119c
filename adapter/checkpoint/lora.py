"""LoRA adapters of PEFT: W + scale * B @ A, merged slice by slice while weights are read, at no cost afterwards.

A directory has adapter_config.json and adapter_model.safetensors, as PEFT's save_pretrained writes them. Headers tell
which weights are updated; of B [out, r] and A [r, in] a rank reads the rows or the columns of its own slice. What a
merge cannot express is refused by name, with what to do. Nothing in a directory is trusted.

A merged slice is bit for bit the slice of the merged whole, so that every tp_size and one process have the same
weights. A library's matrix product does not give that: in which order it adds depends on the shape. Here the order
does not matter: each row of B and column of A is first rounded to so few bits below its own largest value that the
float64 product of the two is exact, whatever adds it up (the first step of Ozaki et al., 2012, "Error-free
transformations of matrix multiplication"). It keeps 25 bits for r <= 8 and 23 for r = 64; float32 has 24.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from adapter.checkpoint.lora_config import CONFIG, MERGE_IT, LoraConfig, read_lora_config
from adapter.checkpoint.safetensors import Checkpoint, TensorInfo, read_header
from adapter.config.files import open_regular
from adapter.config.hub import shown
from policies.errors import UserError
from policies.policy import Geometry, Policy
from policies.rules import Claim, Head, TensorSlice, Vocab

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every tensor that PEFT saves
A, B = ".lora_A.weight", ".lora_B.weight"
BASE = ".base_layer.weight"  # the weight itself, which PEFT saves with an update of the head and loads in its place
DTYPES = ("F32", "F16", "BF16")
STRAY = {  # part of a tensor's name -> what it is
    "lora_embedding_": "updates an embedding", ".lora_B.bias": "is a bias of B",
    "lora_magnitude_vector": "is DoRA's, which scales rows of the merged weight",
}
MANTISSA = 53  # bits of a float64
CHUNK = 1 << 17  # elements that are merged at a time, in float64


@dataclass(frozen=True)
class Update:
    """One weight's: `a` [r, in], `b` [out, r] and the factor of their product. base: the weight [out, in] that it is
    for, where the adapter has it."""

    a: TensorInfo
    b: TensorInfo
    scale: float
    base: TensorInfo | None = None

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.a, self.b, *([self.base] if self.base else []))


@dataclass(frozen=True)
class Adapter:
    """An adapter directory: parameter (published name) -> its update."""

    directory: Path
    updates: Mapping[str, Update]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides what is merged: the file of tensors, the scales. Raises UserError."""
        hasher = hashlib.sha256(json.dumps(sorted((n, u.scale) for n, u in self.updates.items())).encode())
        try:
            with open_regular(self.directory / WEIGHTS) as stream:
                while chunk := stream.read(1 << 24):
                    hasher.update(chunk)
        except OSError as error:
            raise UserError(f"{self.directory / WEIGHTS}: cannot be read: {error.strerror}") from None
        return hasher.hexdigest()

    @property
    def facts(self) -> dict[str, object]:
        """What `plan` says of it."""
        ranks = sorted({update.a.shape[0] for update in self.updates.values()})
        return {"path": shown(self.directory), "weights": len(self.updates), "r": ranks,
                "bytes": sum(info.nbytes for update in self.updates.values() for info in update.tensors)}


@dataclass
class MergedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are read with the updates of adapters, applied in their order, in `dtype`."""

    adapters: tuple[Adapter, ...] = ()
    dtype: str = "float32"
    files: Checkpoint = field(default_factory=lambda: Checkpoint(Path(), {}, []))

    @classmethod
    def of(cls, base: Checkpoint, adapters: Sequence[Adapter], dtype: str) -> MergedCheckpoint:
        infos = {_key(info): info for a in adapters for update in a.updates.values() for info in update.tensors}
        return cls(**vars(base), adapters=tuple(adapters), dtype=dtype, files=Checkpoint(base.directory, infos, []))

    def updates(self, name: str) -> list[Update]:
        """Those of tensor `name` (published name), in order."""
        return [adapter.updates[name] for adapter in self.adapters if name in adapter.updates]

    def read(self, name: str, part: TensorSlice) -> Tensor:
        """This slice of tensor `name` (published name): merged and in `dtype` where an adapter updates it, else in the
        file's. Raises UserError as `Checkpoint.read` does."""
        import torch

        updates, before = self.updates(name), self.files.bytes_read
        stored = [update.base for update in updates if update.base]
        base = self.files.read(_key(stored[-1]), part) if stored else super().read(name, part)
        if not updates:
            return base
        rows, columns = (part.ranges if part.dim == dim else None for dim in (0, 1))
        pairs = [(self.files.read(_key(u.b), _cut(u.b.shape, 0, rows)),
                  self.files.read(_key(u.a), _cut(u.a.shape, 1, columns)), u.scale) for u in updates]
        self.bytes_read += self.files.bytes_read - before
        return merge(base, pairs, getattr(torch, self.dtype))


def _key(info: TensorInfo) -> str:
    return f"{info.file}:{info.name}"


def _cut(shape: tuple[int, ...], dim: int, ranges: tuple[tuple[int, int], ...] | None) -> TensorSlice:
    return TensorSlice(shape) if ranges is None else TensorSlice(shape, dim, ranges)


def merge(weight: Tensor, updates: Sequence[tuple[Tensor, Tensor, float]], dtype: torch.dtype) -> Tensor:
    """Return weight [N, K] + the sum of (scale * B [N, r]) @ A [r, K] over (B, A, scale), added in float64 in that
    order and rounded to `dtype` at the end.

    An element depends on its own row of B and column of A alone, and on no order of summation: see above.
    """
    import torch

    out = torch.empty(weight.shape, dtype=dtype)
    short = [_shortened(b.double() * scale, a.double()) for b, a, scale in updates]
    step = max(1, CHUNK // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        total = weight[rows].double()
        for b, a in short:
            total += b[rows] @ a
        out[rows] = total.float()  # and to float16 or bfloat16 from there
    return out


def _shortened(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """B [N, r] and A [r, K], float64, rounded so that a sum of their r products has at most 53 bits."""
    bits = (MANTISSA - (len(a) - 1).bit_length()) // 2
    return _rounded(b, 1, bits), _rounded(a, 0, bits)


def _rounded(x: Tensor, dim: int, bits: int) -> Tensor:
    """Round to multiples of 2^(e - bits), 2^e being the power of two above the largest magnitude along `dim`."""
    import torch

    exponent = (torch.frexp(x.abs().amax(dim, keepdim=True)).exponent.long() - bits).clamp_min(-1000)
    unit = ((exponent + 1023) << 52).view(torch.float64)  # 2^exponent, by its bits: pow may be off by one
    return (x / unit).round_().mul_(unit)


def open_adapters(directories: Sequence[Path], policy: Policy, geometry: Geometry, base: Mapping[str, object],
                  problems: list[str]) -> tuple[Adapter, ...]:
    """Read the configs and headers of adapters for a model of `geometry`; what is wrong goes to `problems`.

    base: the model's config.json.
    """
    if directories and base.get("quantization_config"):
        problems.append("model.adapters: config.json has a quantization_config, and an adapter is merged into weights "
                        "that are not quantised; set model.path to the model in bfloat16 or float16, and weights."
                        "format if it is to be held in 8 or 4 bits")
    return tuple(_open(directory, policy, geometry, problems) for directory in directories)


def _open(directory: Path, policy: Policy, geometry: Geometry, problems: list[str]) -> Adapter:
    found: list[str] = []
    config = read_lora_config(directory, found)
    infos: list[TensorInfo] = []
    if os.path.lexists(directory / PICKLED) and not os.path.lexists(directory / WEIGHTS):
        found.append(f"{PICKLED}: a file that can run code when opened; load the adapter with peft in a trusted "
                     "environment, and save it with save_pretrained, which writes safetensors")
    elif config:
        infos = read_header(directory / WEIGHTS, found) or []
    updates = _Pairs(policy, geometry, config).updates(infos, found) if config and not found else {}
    problems += [f"model.adapters: {shown(directory)}/{problem}" for problem in found]
    return Adapter(directory, updates)


@dataclass(frozen=True)
class _Pairs:
    """The tensors of one file as updates of a model's weights."""

    policy: Policy
    geometry: Geometry
    config: LoraConfig

    @cached_property
    def claims(self) -> Mapping[str, Claim]:
        return self.policy.claims(self.geometry)

    def updates(self, infos: Sequence[TensorInfo], found: list[str]) -> dict[str, Update]:
        """Parameter -> its update; what does not fit the model or the config goes to `found`."""
        halves: dict[str, dict[str, TensorInfo]] = {}
        for info in sorted(infos, key=lambda info: info.name):
            end = next((end for end in (A, B, BASE) if info.name.endswith(end)), None)
            if end is None or not info.name.startswith(PREFIX):
                found.append(f"{WEIGHTS}: {self._stray(info)}")
            else:
                halves.setdefault(info.name[len(PREFIX):-len(end)], {})[end] = info
        if not infos:
            found.append(f"{WEIGHTS}: holds no tensor")
        updates: dict[str, Update] = {}
        for module, pair in halves.items():
            if problem := self._problem(module, pair):
                found.append(f"{WEIGHTS}: {problem}")
                continue
            name = f"{self.policy.published(module)}.weight"
            if name in updates:
                found.append(f"{WEIGHTS}: {updates[name].a.name!r} and {pair[A].name!r} are the same module's")
            updates[name] = Update(pair[A], pair[B], self.config.scale(module), pair.get(BASE))
        return updates

    def _stray(self, info: TensorInfo) -> str:
        why = next((why for part, why in STRAY.items() if part in info.name), f"is none of {PREFIX}MODULE{A} and {B}")
        tie = ", and here it is tied to the head: save the result with tie_word_embeddings false" if (
            self.geometry.tied and "lora_embedding" in info.name) else ""
        return f"tensor {info.name!r} {list(info.shape)} {why}; {MERGE_IT}{tie}"

    def _problem(self, module: str, pair: Mapping[str, TensorInfo]) -> str | None:
        """Why the two tensors of a module are no update of a weight of this model; None where they are one."""
        info = next(iter(pair.values()))
        name = self.policy.published(module)
        claim = self.claims.get(name)
        if claim is None:
            return (f"tensor {info.name!r} {list(info.shape)} updates {name!r}, which a {self.policy.model_type} of "
                    "this config.json has not; is it an adapter of this model?")
        if refusal := self._refusal(name, claim):
            return f"tensor {info.name!r}: {refusal}"
        if missing := [end for end in (A, B) if end not in pair]:
            return f"tensor {info.name!r} is there and {PREFIX}{module}{missing[0]} is not; save the adapter again"
        r, (rows, columns) = self.config.rank(module), (self.geometry.sizes[d] for d in claim.weight)
        for end, shape in ((A, (r, columns)), (B, (rows, r)), (BASE, (rows, columns))):
            if end not in pair:
                continue
            info = pair[end]
            if info.shape != shape:
                return (f"tensor {info.name!r} has shape {list(info.shape)}; r = {r} of {CONFIG} and the weight "
                        f"[{rows}, {columns}] make {list(shape)}")
            if info.dtype not in DTYPES:
                return f"tensor {info.name!r} has dtype {info.dtype}; known: {', '.join(DTYPES)}"
        return None

    def _refusal(self, name: str, claim: Claim) -> str | None:
        if len(claim.weight) != 2 or isinstance(claim.rule, Vocab):
            return f"{name!r} is no linear layer; {MERGE_IT}"
        tied = (parameter.rpartition(".")[0] for parameter in self.policy.tied)
        if self.geometry.tied and name in tied and isinstance(claim.rule, Head):
            return (f"{name!r} is tied to {self.policy.tied[1]!r}, and merging would change both; {MERGE_IT}, saved "
                    "with tie_word_embeddings false")
        return None
