"""Safetensors checkpoints: headers without weights, and any rank's slice of any tensor without the rest.

The files are read with pread into the tensor that will hold the slice. Nothing is mapped, so no page of another rank's
part ever counts against this process, every byte read is counted, and a file that shrinks underneath is an error here
and not a SIGBUS. The format (an 8-byte little-endian header length, a JSON header, raw row-major data) is documented at
https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter.checkpoint.other_formats import other_format
from adapter.checkpoint.quantised.form import FLOATS, Form
from adapter.config.files import open_regular, read_text
from adapter.config.hub import shown
from policies.errors import UserError
from policies.policy import Geometry, Policy
from policies.rules import TensorSlice

if TYPE_CHECKING:
    import torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DENSE = ("F64", "F32", "F16", "BF16")  # what a parameter may have that is not quantised
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4, "F8_E4M3": 1}
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I32": "int32",
               "F8_E4M3": "float8_e4m3fn"}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_CONFIG_BYTES = 8 << 20
MAX_NAME, MAX_DIMS, MAX_SIZE = 1000, 8, 2**63 - 1  # of a tensor: what is beyond is broken, and messages stay readable


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` is from the start of `file`, in bytes; `dtype` is safetensors' name for it."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Promise:
    """What a stored tensor must be: its shape, one of these dtypes; of: what it is a part of, for messages."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = DENSE
    of: str = ""


@dataclass
class Checkpoint:
    """The tensors of a model directory by published name, what is wrong with them, and a count of bytes read.

    explained: names whose absence `problems` already accounts for; None where that may be any (an unreadable index).
    swapped: tensors that the files hold with their last two dimensions swapped; `check` finds them.
    form: how weights of layers may be stored. spare: such a weight -> a tensor of its layer that must be zero.
    """

    directory: Path
    tensors: dict[str, TensorInfo]
    problems: list[str]
    bytes_read: int = field(default=0)
    explained: frozenset[str] | None = frozenset()
    swapped: frozenset[str] = frozenset()
    form: Form | None = None
    spare: dict[str, str] = field(default_factory=dict)

    def check(self, policy: Policy, geometry: Geometry) -> list[str]:
        """Every way in which the tensors differ from what the policy and config.json promise, in words."""
        expected, found = self._promised(policy.inventory(geometry)), list(self.problems)
        tied_copy = policy.tied[0] if geometry.tied else None
        explained = expected.keys() if self.explained is None else self.explained
        for name in sorted(expected.keys() - self.tensors.keys() - explained - {tied_copy}):
            found.append(f"tensor {name!r} {list(expected[name].shape)} is missing from {shown(self.directory)}")
        for name in sorted(self.tensors.keys() - expected.keys()):
            if not policy.ignores(name):
                found.append(f"{self.tensors[name].file.name}: tensor {self.tensors[name].name!r} is not part of a "
                             f"{policy.model_type} of this config.json")
        self.swapped = self._swapped(policy, geometry)
        expected |= {name: Promise(_swapped_shape(expected[name].shape)) for name in self.swapped}
        for name in sorted(self.tensors.keys() & expected.keys()):
            info, promise = self.tensors[name], expected[name]
            if info.shape != promise.shape:
                found.append(f"{info.file.name}: tensor {info.name!r} has shape {list(info.shape)}, "
                             f"config.json says {list(promise.shape)}{promise.of}")
            if info.dtype not in promise.dtypes:
                found.append(f"{info.file.name}: tensor {info.name!r} has dtype {info.dtype}; "
                             f"known: {', '.join(promise.dtypes)}{promise.of}")
        return found

    def _swapped(self, policy: Policy, geometry: Geometry) -> frozenset[str]:
        """Return the tensors that the files hold with swapped dimensions: all that may be, as soon as the shape of one
        shows it, since a square one has the same shape either way; else none."""
        shapes = {f"{module}.{suffix}": tuple(geometry.sizes[d] for d in dims)
                  for module, claim in policy.claims(geometry).items() if claim.transposed
                  for suffix, dims in claim.parameters().items()}
        found = any(shape != _swapped_shape(shape) == self.tensors[name].shape
                    for name, shape in shapes.items() if name in self.tensors)
        return frozenset(shapes) if found else frozenset()

    def _promised(self, inventory: Mapping[str, tuple[int, ...]]) -> dict[str, Promise]:
        """Name -> what is promised, of the tensors that hold these parameters: themselves, or the parts of weights that
        are stored quantised, with what else their layers may have, which goes to `spare`."""
        promised = {}
        for name, shape in inventory.items():
            if not self.is_quantised(name) or len(shape) != 2:
                promised[name] = Promise(shape)
                continue
            assert self.form is not None
            module, of = name.rpartition(".")[0], f" ({self.form})"
            promised |= {f"{module}.{ending}": Promise(stored, self.form.dtypes[ending], of)
                         for ending, stored in self.form.shapes(shape).items()}
            for spare in (f"{module}.{ending}" for ending in self.form.spare):
                if spare in self.tensors and spare not in inventory:
                    promised[spare], self.spare[name] = Promise(shape[:1], FLOATS, of), spare
        return promised

    def is_quantised(self, name: str) -> bool:
        """Whether the files hold this parameter (published name) in `form`: they do as soon as they have a part of it.

        The files decide, and not the config's modules_to_not_convert, whose names and patterns differ by writer.
        """
        module, _, suffix = name.rpartition(".")
        return self.form is not None and suffix == "weight" and any(
            (info := self.tensors.get(f"{module}.{ending}")) is not None and info.dtype in dtypes
            for ending, dtypes in self.form.dtypes.items())

    def read(self, name: str, part: TensorSlice) -> torch.Tensor:
        """This slice of parameter `name` (published name) in new memory: in the file's dtype, in float32 where it is
        stored quantised. Raises UserError where a file ends early, cannot be read or contradicts itself."""
        if self.form is None or not self.is_quantised(name):
            return self.read_stored(name, part)
        module = name.rpartition(".")[0]
        spare = self.spare.get(name)
        if spare is not None and self.read_stored(spare, TensorSlice(self.tensors[spare].shape)).any():
            raise UserError(f"{self.tensors[spare].file}: tensor {self.tensors[spare].name!r} is not zero, and this "
                            "layer has no such parameter in a model of this type")
        try:
            return self.form.read(part, lambda ending, piece: self.read_stored(f"{module}.{ending}", piece))
        except IndexError as error:
            raise UserError(f"{shown(self.directory)}: weight {name!r}: {error}; download it again") from None

    def read_stored(self, name: str, part: TensorSlice) -> torch.Tensor:
        """This slice of tensor `name` (published name), in the file's dtype, in new memory.

        Raises UserError where the file ends early or cannot be read.
        """
        info = self.tensors[name]
        if name in self.swapped:
            return self._read(info, swapped(part)).transpose(1, 2).contiguous()
        return self._read(info, part)

    def _read(self, info: TensorInfo, part: TensorSlice) -> torch.Tensor:
        import torch

        from adapter.kernels import build

        assert info.shape == part.shape, (info.name, info.shape, part.shape)
        out = torch.empty(part.local_shape, dtype=getattr(torch, TORCH_NAMES[info.dtype]))
        if part.dim == 2 and len(part.shape) == 3:
            self._read_matrices(info, part, out)
            return out
        raw = out.reshape(-1).view(torch.uint8)
        with opened(info) as fd:
            columns = part.dim == 1 == len(part.ranges) and len(part.shape) == 2
            if columns and out.numel() and build.unavailable() is None:
                _read_columns(fd, raw.view(len(out), -1), info, part)
            else:
                _read_runs(fd, raw, info, part)
        self.bytes_read += len(raw)
        return out

    def _read_matrices(self, info: TensorInfo, part: TensorSlice, out: torch.Tensor) -> None:
        """Fill out [E, M, n] with columns of a tensor [E, M, N], a matrix [M, N] at a time: of an expert's rows a rank
        has so few bytes each that reading them one by one takes longer than reading them all."""
        import torch

        matrix = torch.empty(part.shape[1:], dtype=out.dtype)
        raw = matrix.view(torch.uint8).reshape(-1)
        with opened(info) as fd:
            for i in range(len(out)):
                _pread_full(fd, raw.numpy().data, info, info.offset + i * raw.numel())
                torch.cat([matrix[:, a:b] for a, b in part.ranges], dim=1, out=out[i])
                self.bytes_read += raw.numel()


def _swapped_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def swapped(part: TensorSlice) -> TensorSlice:
    """The same slice of the tensor [E, M, N] held as [E, N, M]."""
    dim = part.dim if not part.dim else 3 - part.dim
    return TensorSlice(_swapped_shape(part.shape), dim, part.ranges)


def open_checkpoint(directory: Path, policy: Policy, form: Form | None = None) -> Checkpoint | None:
    """Read every header in `directory`; None where it holds no safetensors file at all. form: of quantised weights.

    What is wrong (a file the index names is missing, a truncated file, a broken header, a tensor the index promises and
    no file has) is collected in `problems`, to be reported together with everything else.
    """
    problems: list[str] = []
    index = directory / INDEX
    promised: Mapping[str, str] = {}
    if os.path.lexists(index):  # a link that leads nowhere is a broken file, not a missing one
        promised = _read_index(index, problems)
        files = sorted(set(promised.values()))
    else:
        files = [SINGLE] if os.path.lexists(directory / SINGLE) else []
        if not files:
            return None
    tensors: dict[str, TensorInfo] = {}
    unreadable: set[str] = set()
    for file in files:
        infos = read_header(directory / file, problems)
        if infos is None:
            unreadable.add(file)
        for info in infos or ():
            published = policy.published(info.name)
            if published in tensors:
                problems.append(f"{file}: tensor {info.name!r} is also in {tensors[published].file.name}")
            tensors[published] = info
    for name, file in promised.items():
        if file not in unreadable and policy.published(name) not in tensors:
            problems.append(f"{INDEX}: promises tensor {name!r} in {file}, which does not hold it")
    blind = bool(problems) and not promised and not tensors
    explained = None if blind else frozenset(map(policy.published, promised))
    return Checkpoint(directory, tensors, problems, explained=explained, form=form)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory as a mapping. Raises UserError where it is missing or broken."""
    file = directory / "config.json"
    try:
        config = json.loads(read_text(file, MAX_CONFIG_BYTES))
    except FileNotFoundError:
        found = other_format(directory) or "model.path must be a model directory"
        raise UserError(f"{shown(directory)}: no config.json here; {found}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: holds a {type(config).__name__}, a mapping is needed")
    return config


def _read_index(index: Path, problems: list[str]) -> Mapping[str, str]:
    """Tensor name -> file name. Names that leave the directory are refused."""
    try:
        weight_map = json.loads(read_text(index, MAX_HEADER_BYTES))["weight_map"]
        pairs = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{index.name}: cannot be read: {error!r}")
        return {}
    outside = sorted({f for f in pairs.values() if Path(f).name != f or f in ("", "..")})
    problems += [f"{index.name}: file {f!r} is not a plain file name of this directory" for f in outside]
    return {name: file for name, file in pairs.items() if file not in outside}


def read_header(file: Path, problems: list[str]) -> list[TensorInfo] | None:
    """Every tensor of one file; None where it cannot be read: why goes to `problems` as 'file name: what'."""
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise ValueError("a git-lfs pointer and not the file itself; fetch it with `git lfs pull`")
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"truncated or not a safetensors file: {size} bytes, header of {length} bytes; "
                                 "download it again")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"its header is a {type(header).__name__}, a mapping is needed")
        header.pop("__metadata__", None)
        infos = [_tensor_info(name, file, entry, 8 + length) for name, entry in header.items()]
        _check_layout(infos, 8 + length, size)
    except FileNotFoundError:
        problems.append(f"{file.name}: missing from {shown(file.parent)}; download it again")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{file.name}: {error}")
    else:
        return infos
    return None


def _tensor_info(name: str, file: Path, entry: Any, data: int) -> TensorInfo:
    if len(name) > MAX_NAME:
        raise ValueError(f"tensor '{name[:60]}...': a name of {len(name)} characters")
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        sound = isinstance(dtype, str) and len(dtype) < MAX_NAME and len(shape) <= MAX_DIMS and all(
            type(n) is int and 0 <= n <= MAX_SIZE for n in numbers)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"tensor {name!r}: header entry {reprlib.repr(entry)} is not a dtype, shape and data_offsets")
    count = math.prod(shape)
    if end < begin or end - begin != count * ITEM_BYTES.get(dtype, (end - begin) // max(count, 1)):
        raise ValueError(f"tensor {name!r}: bytes {begin} to {end} do not hold {list(shape)} of {dtype}")
    return TensorInfo(name, file, dtype, shape, data + begin, end - begin)


def _check_layout(infos: list[TensorInfo], data: int, file_size: int) -> None:
    """Tensors must fill the file from `data` to its end, one after the other, as the format demands."""
    at, before = data, "the header"
    for info in sorted(infos, key=lambda i: (i.offset, i.nbytes)):
        if info.offset != at:
            raise ValueError(f"tensor {info.name!r} begins at byte {info.offset}, but {before} ends at {at}")
        at, before = info.offset + info.nbytes, f"tensor {info.name!r}"
        if at > file_size:
            raise ValueError(f"truncated: {file_size} bytes, but {before} ends at {at}; download it again")
    if at != file_size:
        raise ValueError(f"{before} ends at byte {at}, but the file has {file_size}")


def _byte_runs(part: TensorSlice, item: int) -> Iterator[tuple[int, int]]:
    """(start, length) in bytes of every contiguous run of a slice of a row-major tensor, in the slice's order."""
    shape = part.shape
    if part.dim is None:
        total = item
        for n in shape:
            total *= n
        yield 0, total
        return
    step = item * math.prod(shape[part.dim + 1:])  # between two neighbours along the dimension that is cut
    block = step * shape[part.dim]
    for at in range(0, block * math.prod(shape[:part.dim]), block or 1):
        yield from ((at + start * step, (stop - start) * step) for start, stop in part.ranges if stop > start)


def _read_runs(fd: int, raw: torch.Tensor, info: TensorInfo, part: TensorSlice) -> None:
    target: memoryview = raw.numpy().data if raw.numel() else memoryview(b"")
    done = 0
    for start, length in _byte_runs(part, ITEM_BYTES[info.dtype]):
        _pread_full(fd, target[done : done + length], info, info.offset + start)
        done += length
    assert done == len(target)


def _read_columns(fd: int, raw: torch.Tensor, info: TensorInfo, part: TensorSlice) -> None:
    """The same for one range of columns: a short read for each row, a hundred thousand in a model, which C++ does in a
    tenth of the time."""
    import torch

    item = ITEM_BYTES[info.dtype]
    row = item * part.shape[1]
    start = info.offset + item * part.ranges[0][0]
    got = torch.ops.qwenvl_tp.read_rows(fd, start, row, raw)
    if got < 0:
        raise UserError(f"{info.file}: cannot be read: {os.strerror(-got)}")
    if got < raw.numel():
        whole, rest = divmod(got, raw.shape[1])
        raise cut_off(info, start + whole * row + rest)


def cut_off(info: TensorInfo, at: int) -> UserError:
    return UserError(f"{info.file}: ends at byte {at}, inside tensor {info.name!r}; it was truncated while it was "
                     "being read")


@contextmanager
def opened(info: TensorInfo) -> Iterator[int]:
    try:
        fd = os.open(info.file, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{info.file}: cannot be opened: {error.strerror}") from None
    try:
        yield fd
    finally:
        os.close(fd)


def _pread_full(fd: int, target: memoryview, info: TensorInfo, offset: int) -> None:
    """Fill `target` from `offset`; a single call may return less than asked (2 GB limit, signals)."""
    done = 0
    while done < len(target):
        try:
            got = os.preadv(fd, [target[done:]], offset + done)
        except OSError as error:
            raise UserError(f"{info.file}: cannot be read: {error.strerror}") from None
        if not got:
            raise cut_off(info, offset + done)
        done += got
