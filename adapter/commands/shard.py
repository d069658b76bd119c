"""Write a model's shards once, so that ranks load theirs without slicing or quantising: one file per rank.

    qwenvl-tp shard --config C --out DIR [key=value ...]
    python launch/shard.py --config C --out DIR ...    from a checkout
    qwenvl-tp generate --config C model.path=DIR       loads them

For the config's tensor_parallel, weights.format and model.dtype, by one process that holds one tensor at a time
(adapter.checkpoint.sharded says what is in DIR). DIR appears when all of it is written, or not at all; one that exists
must be empty. stdout: a summary. Exit 2: bad input.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from adapter.checkpoint.lora import MergedCheckpoint
from adapter.checkpoint.safetensors import Checkpoint
from adapter.checkpoint.sharded import (
    ALIGN,
    MANIFEST,
    Manifest,
    RankFile,
    entries,
    file_name,
    is_sharded,
    parameters,
    slicing,
)
from adapter.commands import common
from adapter.config.files import open_regular
from adapter.planning.load import checked_plan, merged_adapters, stated
from adapter.planning.plan import Plan
from policies.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from adapter.kernels.linear import Weight

log = logging.getLogger("adapter")
CARRIED = (  # what Transformers reads of a model's directory besides weights
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja", "LICENSE")
MOST_CARRIED = 256 << 20  # bytes of one of them


def main(args: argparse.Namespace, results: common.Results) -> int:
    from adapter.config.load import load_config

    config, began = load_config(args.config, args.overrides), time.perf_counter()
    source = config.weights.original or config.model.path
    if is_sharded(source):
        raise UserError(f"{source}: holds shards already; shards are made from the model's own files: set model.path "
                        "or weights.original to their directory")
    plan, checkpoint = checked_plan(source, **stated(config))
    assert isinstance(checkpoint, Checkpoint)
    common.clean_up_on_signals()
    manifest = write_shards(plan, checkpoint, Path(args.out))
    results.write({"summary": True, "out": str(args.out), **manifest.model_dump(mode="json"),
                   "seconds": round(time.perf_counter() - began, 3)})
    return common.DONE


def write_shards(plan: Plan, checkpoint: Checkpoint, out: Path) -> Manifest:
    """Write the directory `out`, or leave nothing. Raises UserError where it is there and not empty, where it cannot be
    written, and as `Checkpoint.read` does."""
    out = Path(os.path.realpath(out))
    try:
        with _appearing(out, sum(map(plan.weight_bytes, range(plan.tp_size)))) as work:
            for name in CARRIED:
                if os.path.lexists(checkpoint.directory / name):
                    _copy(checkpoint.directory / name, work / name)
            files, adapters = [], checkpoint.adapters if isinstance(checkpoint, MergedCheckpoint) else ()
            for rank in range(plan.tp_size):
                log.info("writing the shard of rank %d of %d, %.3f GB", rank, plan.tp_size,
                         plan.weight_bytes(rank) / 1e9)
                files.append(_write(plan, checkpoint, rank, work / file_name(rank, plan.tp_size)))
            manifest = Manifest.model_validate({
                "model_type": plan.policy.model_type, "tp_size": plan.tp_size,
                "whole_encoder": plan.whole_encoder, "dtype": plan.dtype,
                "format": plan.form.name, "slicing": slicing(plan), "files": tuple(files),
                "adapters": merged_adapters(adapters)})
            with open(work / MANIFEST, "w", encoding="utf-8") as stream:
                stream.write(manifest.model_dump_json(indent=1) + "\n")
                _to_disk(stream)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    return manifest


@contextmanager
def _appearing(out: Path, size: int) -> Iterator[Path]:
    """A directory beside `out` to write `size` bytes into: it becomes `out` at the end, or goes on any error.

    Its name is fixed and it is locked, so that what a killed run left is found and removed. Raises UserError, OSError.
    """
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there and not an empty directory; name another one, or remove it")
    if os.path.ismount(out):
        raise UserError(f"--out {out}: is a mount point, which cannot be replaced; name a directory in it")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no directory {out.parent}")
    work = out.with_name(f".{out.name}.partial")
    os.makedirs(work, exist_ok=True)
    lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another process is writing it") from None
        try:
            for left in list(work.iterdir()):
                log.info("removing %s of a run that was killed", left)
                left.unlink()
            if (free := shutil.disk_usage(work).free) < size:
                raise UserError(f"--out {out}: {size / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free there")
            yield work
            os.fsync(lock)
            os.rename(work, out)  # replaces an empty directory, and nothing else
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _write(plan: Plan, checkpoint: Checkpoint, rank: int, file: Path) -> RankFile:
    """One rank's file, tensor after tensor."""
    digest, size = hashlib.sha256(), 0
    with open(file, "wb") as stream:
        for chunk in chain([memoryview(_header(plan, rank))], map(_bytes, _tensors(plan, checkpoint, rank))):
            size += stream.write(chunk)
            digest.update(chunk)
            del chunk  # its tensor goes before the next one comes
        _to_disk(stream)
    return RankFile(name=file.name, bytes=size, sha256=digest.hexdigest())


def _header(plan: Plan, rank: int) -> bytes:
    """As safetensors writes it; padded with blanks, which the format allows, so that the data begins aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries(plan, rank):
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def _tensors(plan: Plan, checkpoint: Checkpoint, rank: int) -> Iterator[Tensor]:
    """What `entries` names, in its order: read, cast and quantised as a rank does that loads the checkpoint itself."""
    import torch

    from adapter.kernels.linear import Quantised, make_weight

    dtype = getattr(torch, plan.dtype)
    for name, _ in parameters(plan):
        module, suffix = plan.place_of(name)
        held: Weight = checkpoint.read(name, plan.slice(module, suffix, rank)).to(dtype)
        if suffix == "weight":
            held = make_weight(held, plan.format_of(module))
        yield from (held.codes, held.scales) if isinstance(held, Quantised) else (held,)
        del held


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _copy(source: Path, target: Path) -> None:
    try:
        stream = open_regular(source, MOST_CARRIED)
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None
    with stream, open(target, "wb") as copy:
        shutil.copyfileobj(stream, copy)
        _to_disk(copy)


def _to_disk(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def start() -> NoReturn:
    arguments = common.parser(__doc__)
    arguments.add_argument("--out", required=True, metavar="DIR", help="the directory to write; it must not exist yet")
    common.run(main, arguments)


if __name__ == "__main__":
    start()
