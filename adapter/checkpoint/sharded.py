"""Pre-sharded checkpoints: a directory of one safetensors file per rank, which holds exactly what that rank holds.

`adapter.commands.shard` writes them, for one tensor_parallel section, dtype and weights.format:

    shards.json                  what they are for, and a digest of each file (Manifest)
    rank-00-of-04.safetensors    parameters by published name in loading order, a quantised one as `.codes`, `.scales`
    config.json, tokenizer.json  and what else the model's directory has for configs and processing

A rank maps its file, and its weights are views of that: nothing is copied, and what the page cache has is not read
again. As with every mapped file, replace it by a new one (mv), and never write into it, while a job runs. Nothing in a
manifest or header is trusted: what does not fit the plan is a problem, reported with all others.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationError

from adapter.checkpoint.safetensors import ITEM_BYTES, TORCH_NAMES, TensorInfo, cut_off, opened, read_header
from adapter.config.files import open_regular, read_text
from adapter.config.schema import Model, Section, TensorParallelSection, Weights
from policies.errors import UserError
from policies.formats import FORMATS, GROUP, format_of

if TYPE_CHECKING:
    from torch import Tensor

    from adapter.kernels.linear import Weight
    from adapter.planning.plan import Plan

MANIFEST = "shards.json"
MAX_MANIFEST_BYTES = 1 << 20
ALIGN = 64  # bytes: a cache line, and what vector loads like; of the file's data, and of a tensor that is mapped
MADV_POPULATE_READ = 22  # Linux 5.14: all page tables in one call, not in a fault for every few pages
BYTES = {**ITEM_BYTES, "U8": 1}
TORCH = {**TORCH_NAMES, "U8": "uint8"}
CODES = {name: code for code, name in TORCH_NAMES.items()}

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class RankFile(Section):
    """One rank's file: its size in bytes and its SHA-256, as sha256sum prints it."""

    name: Annotated[str, Field(max_length=100)]
    bytes: Annotated[int, Field(ge=0)]
    sha256: Digest


class MergedAdapter(Section):
    """One of model.adapters: its directory's name, for messages, and its digest (adapter.checkpoint.lora)."""

    name: Annotated[str, Field(max_length=1000)]
    digest: Digest


class Manifest(Section):
    """shards.json. `slicing` is a digest of what decides which slice a rank has: see `slicing`."""

    version: Literal[1] = 1  # of all that is not stated here: names, order, how codes are packed (kernels.quantise)
    model_type: Annotated[str, Field(max_length=100)]
    tp_size: Annotated[int, Field(ge=1, le=1024)]
    whole_encoder: bool  # tensor_parallel.vision: data and auto
    dtype: Literal["float32", "bfloat16", "float16"]
    format: Literal["dense", "int8", "int4"]
    group: Annotated[int, Field(ge=1)] = GROUP
    slicing: Digest
    adapters: Annotated[tuple[MergedAdapter, ...], Field(max_length=1024)] = ()  # in the order of their application
    files: Annotated[tuple[RankFile, ...], Field(max_length=1024)]


@dataclass(frozen=True)
class Entry:
    """A tensor of a rank's file; `dtype` is safetensors' name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


@dataclass
class Shards:
    """The files of all ranks, what is wrong with them, and a count of bytes read. `plan`: the one they were cut by.

    files: of each rank stored name -> where it lies; empty for a file that cannot be read.
    """

    directory: Path
    plan: Plan
    manifest: Manifest | None = None
    files: tuple[Mapping[str, TensorInfo], ...] = ()
    problems: list[str] = field(default_factory=list)
    bytes_read: int = 0

    def load(self, rank: int) -> dict[str, Weight]:
        """What `rank` holds, by parameter name. Raises UserError where its file ends early or cannot be read."""
        import torch

        from adapter.kernels.linear import Quantised

        held = {}
        infos = [self.files[rank][e.name] for e in entries(self.plan, rank)]
        pages = _mapped(infos[0])
        for info in infos:
            if info.offset + info.nbytes > len(pages):
                raise cut_off(info, len(pages))
            raw = torch.frombuffer(pages, dtype=torch.uint8, count=info.nbytes, offset=info.offset) if info.nbytes \
                else torch.empty(0, dtype=torch.uint8)
            raw = raw.clone() if info.offset % ALIGN else raw
            held[info.name] = raw.view(getattr(torch, TORCH[info.dtype])).view(info.shape)
            self.bytes_read += info.nbytes
        dtype = getattr(torch, self.plan.dtype)
        return {name: Quantised(held[f"{name}.codes"], held[f"{name}.scales"], bits, self.inputs(name, rank), dtype)
                if bits else held[name] for name, bits in parameters(self.plan)}

    def inputs(self, name: str, rank: int) -> int:
        """Of a quantised weight, whose last group may be filled up."""
        return self.plan.slice(*self.plan.place_of(name), rank).local_shape[1]

    def file(self, rank: int) -> Path:
        return self.directory / file_name(rank, self.plan.tp_size)


def _mapped(info: TensorInfo) -> mmap.mmap:
    """All of a tensor's file, copied where it is written to, which nothing does."""
    with opened(info) as fd:
        try:
            pages = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:  # a file system that maps nothing, a file that has become empty
            raise UserError(f"{info.file}: cannot be mapped into memory: {error}") from None
    with suppress(OSError):
        pages.madvise(MADV_POPULATE_READ)
    return pages


def is_sharded(directory: Path) -> bool:
    return os.path.lexists(directory / MANIFEST)


def file_name(rank: int, tp_size: int) -> str:
    return f"rank-{rank:02d}-of-{tp_size:02d}.safetensors"


def parameters(plan: Plan) -> list[tuple[str, int]]:
    """(name, bits of a code) of every parameter in the order of a file: plain ones, bits 0, before quantised ones, so
    that each tensor lies at a multiple of its item's size."""
    found = [(f"{m}.{s}", plan.format_of(m).bits if s == "weight" else 0) for m, s in plan.parameters()]
    return sorted(found, key=lambda named: bool(named[1]))


def entries(plan: Plan, rank: int) -> Iterator[Entry]:
    """What the file of `rank` holds, in order."""
    for name, bits in parameters(plan):
        shape = plan.slice(*plan.place_of(name), rank).local_shape
        if bits:
            groups = -(-shape[1] // GROUP)
            yield Entry(f"{name}.codes", "U8", (shape[0], groups * GROUP * bits // 8))
            yield Entry(f"{name}.scales", "F16", (shape[0], groups))
        else:
            yield Entry(name, CODES[plan.dtype], shape)


def slicing(plan: Plan) -> str:
    """SHA-256 of all that decides what each rank's file holds: the table, sizes, boundaries and formats."""
    rows = [[c.module, type(c.rule).__name__, {suffix: (dims, cut and (cut.dim, cut.axes))
                                               for suffix, dims in c.parameters().items()
                                               for cut in [c.rule.cut(suffix, c.parameters())]}, c.kind,
             format_of(c, plan.form, plan.geometry.text_stack).name] for c in plan.policy.table]
    facts = [rows, dict(plan.geometry.sizes), dict(plan.geometry.layers), plan.geometry.kinds,
             plan.geometry.tied, plan.policy.tied,
             plan.whole_encoder, plan.policy.encoder.module, plan.dtype, GROUP,
             {axis: split.ranges for axis, split in plan.splits.items()}]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Raises UserError where it is missing, too large or not as `Manifest` says."""
    file = directory / MANIFEST
    try:
        return Manifest.model_validate_json(read_text(file, MAX_MANIFEST_BYTES))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'it'} = {reprlib.repr(e['input'])}: {e['msg']}"
                 for e in error.errors(include_url=False)[:10]]
        raise UserError(f"{MANIFEST}: not the manifest of shards that this release reads; run launch/shard.py again: "
                        + "; ".join(lines)) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{MANIFEST}: cannot be read: {error}") from None


def open_shards(directory: Path, wanted: Plan, adapters: tuple[MergedAdapter, ...] = ()) -> Shards:
    """The manifest and the header of every file, held against `wanted` and the adapters of the config; what is wrong is
    in `problems`."""
    try:
        manifest = read_manifest(directory)
    except UserError as error:
        return Shards(directory, wanted, problems=[str(error)])
    plan = replace(wanted, tp_size=manifest.tp_size, dtype=manifest.dtype, vision=_vision(manifest, wanted),
                   form=FORMATS[manifest.format])
    problems = [*_misfits(manifest, plan, wanted), *_other_adapters(manifest.adapters, adapters)]
    impossible = plan.policy.problems(plan.geometry, plan.tp_size) or plan.off_group()
    if impossible:
        return Shards(directory, plan, manifest, problems=problems + [f"{MANIFEST}: {p}" for p in impossible])
    if manifest.slicing != slicing(plan):
        problems.append(f"{MANIFEST}: these shards were cut by another policy or config.json than there is now; run "
                        "launch/shard.py again")
    names = [file_name(rank, plan.tp_size) for rank in range(plan.tp_size)]
    if (listed := [f.name for f in manifest.files]) != names:
        odd = sorted(set(listed) ^ set(names)) or "their order"
        problems.append(f"{MANIFEST}: its files must be {names[0]} to {names[-1]}, each once; what differs: {odd}")
        return Shards(directory, plan, manifest, problems=problems)
    files = tuple(_file(directory / f.name, f.bytes, list(entries(plan, rank)), problems)
                  for rank, f in enumerate(manifest.files))
    return Shards(directory, plan, manifest, files, problems)


def _vision(manifest: Manifest, wanted: Plan) -> str:
    """The tensor_parallel.vision that the files are for: the wanted one wherever they can serve it."""
    if manifest.tp_size == 1:
        return wanted.vision  # one rank holds the whole encoder in every mode
    if manifest.whole_encoder:
        return "data" if wanted.vision == "tensor" else wanted.vision
    return "tensor"


def _misfits(manifest: Manifest, plan: Plan, wanted: Plan) -> Iterator[str]:
    """What the config wants otherwise than the shards are, each with what to do."""
    parallel = TensorParallelSection()
    facts = (("tensor_parallel.tp_size", plan.tp_size, wanted.tp_size, parallel.tp_size),
             ("tensor_parallel.vision", plan.vision, wanted.vision, parallel.vision),
             ("model.dtype", plan.dtype, wanted.dtype, Model.model_fields["dtype"].default),
             ("weights.format", plan.form.name, wanted.form.name, Weights().format))
    for key, have, want, default in facts:
        if have != want:
            where = ", its default where the config states none" if want == default else ""
            yield (f"{MANIFEST}: these shards are for {key} {have}, the config's is {want}{where}; set {key}={have}, "
                   f"or run launch/shard.py with {key}={want} on the model they were made from")
    if manifest.model_type != wanted.policy.model_type:
        yield f"{MANIFEST}: model_type {manifest.model_type!r}, config.json says {wanted.policy.model_type!r}"
    if manifest.group != GROUP:
        yield f"{MANIFEST}: a scale for {manifest.group} weights, this release has one for {GROUP}"


def _other_adapters(have: tuple[MergedAdapter, ...], wanted: tuple[MergedAdapter, ...]) -> Iterator[str]:
    """That the shards have other adapters merged than the config names, in words."""
    if [a.digest for a in have] != [a.digest for a in wanted]:
        merged, named = ([a.name for a in adapters] for adapters in (have, wanted))
        same = ", whose contents are others" if merged == named else ""
        yield (f"{MANIFEST}: these shards have the adapters {merged} merged, the config's model.adapters are {named}"
               f"{same}; name the same in the same order, or run launch/shard.py with the config's on the model they "
               "were made from")


def _file(file: Path, size: int, expected: list[Entry], problems: list[str]) -> Mapping[str, TensorInfo]:
    """The tensors of one rank's file; how they differ from what is expected goes to `problems`."""
    before = len(problems)
    infos = {info.name: info for info in read_header(file, problems) or ()}
    if len(problems) > before or not infos:
        problems += [] if len(problems) > before else [f"{file.name}: holds no tensor"]
        return {}
    if (found := max(info.offset + info.nbytes for info in infos.values())) != size:
        problems.append(f"{file.name}: has {found} bytes, {MANIFEST} says {size}")
    names = {entry.name for entry in expected}
    problems += [f"{file.name}: tensor {name!r} is not part of this rank's shard" for name in infos.keys() - names]
    for entry in expected:
        info = infos.get(entry.name)
        if info is None:
            problems.append(f"{file.name}: tensor {entry.name!r} {list(entry.shape)} is missing")
        elif (info.dtype, info.shape, info.nbytes) != (entry.dtype, entry.shape, entry.nbytes):
            problems.append(f"{file.name}: tensor {entry.name!r} is {list(info.shape)} of {info.dtype}, this rank's "
                            f"shard has {list(entry.shape)} of {entry.dtype}")
    return infos


def read_held(shards: Shards, rank: int, name: str) -> Weight:
    """What the file of `rank` has of a parameter, read by the safetensors package: for verify, which asks another rank
    than the one that loaded it."""
    import torch
    from safetensors import safe_open

    from adapter.kernels.linear import Quantised

    with safe_open(shards.file(rank), framework="pt") as file:
        bits = dict(parameters(shards.plan))[name]
        if not bits:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor
        codes, scales = (file.get_tensor(f"{name}.{part}") for part in ("codes", "scales"))
        return Quantised(codes, scales, bits, shards.inputs(name, rank), getattr(torch, shards.plan.dtype))


def read_whole(shards: Shards, name: str) -> Tensor:
    """A parameter put together from all files that have a part of it, unpacked where it is quantised."""
    import torch

    whole: torch.Tensor | None = None
    for rank in range(shards.plan.tp_size):
        part, held = shards.plan.slice(*shards.plan.place_of(name), rank), read_held(shards, rank, name)
        tensor = held if isinstance(held, torch.Tensor) else held.dense()
        if part.dim is None:
            return tensor
        whole = tensor.new_empty(part.shape) if whole is None else whole
        done = 0
        for start, stop in part.ranges:
            whole.narrow(part.dim, start, stop - start).copy_(tensor.narrow(part.dim, done, stop - start))
            done += stop - start
    assert whole is not None
    return whole


def sha256(file: Path) -> str:
    """Of a whole file. Raises UserError where it cannot be read."""
    try:
        with open_regular(file) as stream:
            digest = hashlib.sha256()
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
            return digest.hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
