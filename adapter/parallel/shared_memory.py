"""Memory that a group's ranks on one host share, to sum and gather through (csrc/shared_memory.cpp).

It has no name, so nothing of it can be left behind: the first rank makes a memory file, the others open it through
/proc. All ranks of the job use it, or none does: whatever a rank cannot do it says, and none waits for it.
"""

from __future__ import annotations

import os
import secrets
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor

from adapter.kernels import build
from adapter.parallel.group import Group, exchange
from adapter.parallel.progress import hash_of_boot

NAME = "the adapter's shared memory"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that it sums, in float32; it gathers all
TOKEN_BYTES = 16
LONGEST = 200  # characters of a refusal on a card


@dataclass(frozen=True)
class Region:
    """One group's memory, mapped by this rank until nobody holds it any more. handle: what the operators take."""

    handle: int

    def __post_init__(self) -> None:
        weakref.finalize(self, torch.ops.qwenvl_tp.region_close, self.handle).atexit = False

    def all_reduce(self, x: Tensor, group: Any) -> None:
        """Sum in place; dtypes that it does not sum go through torch's `group`, as DeepSpeed's own op has it."""
        if x.dtype in DTYPES:
            torch.ops.qwenvl_tp.all_reduce_.default(x, self.handle)
        else:
            dist.all_reduce(x, group=group)

    def all_gather(self, out: Tensor, x: Tensor, group: Any) -> None:
        torch.ops.qwenvl_tp.all_gather_.default(out, x, self.handle)


@dataclass(frozen=True)
class Offer:
    """What a rank tells the others. refusal: why it cannot share memory. fd, token: of a group's first rank, the file
    in its process and the file's first bytes."""

    refusal: str | None
    host: int = 0
    pid: int = 0
    fd: int = -1
    token: str = ""


def join(world: Group, place: int, ranks: Sequence[int], limit_s: float) -> Region | str:
    """The memory of the group that has this rank at `place` of `ranks` (numbers in the world), or in words why there
    is none, for any group. Every rank must call it. limit_s: how long a rank may wait for another in a collective."""
    mine = _offer(len(ranks), place == 0)
    try:
        offers = [Offer(**card) for card in exchange(world, asdict(mine))]
        if refusal := common([o.refusal for o in offers]):
            return refusal
        region = _open([offers[r] for r in ranks], place, ranks, limit_s)
        refused = region if isinstance(region, str) else None
        return common([card["refusal"] for card in exchange(world, {"refusal": refused})]) or region
    finally:
        if mine.fd >= 0:
            os.close(mine.fd)  # every rank has opened it by now, or will not


def common(refusals: Sequence[str | None]) -> str | None:
    """What the ranks refuse, in words; None where none does."""
    said = {r: refusal for r, refusal in enumerate(refusals) if refusal}
    if len(said) == len(refusals) and len(set(said.values())) == 1:
        return said[0]
    return "; ".join(f"rank {r}: {refusal}" for r, refusal in said.items()) or None


def short(words: object) -> str:
    """Words as a card holds them."""
    return str(words).encode("ascii", "replace").decode()[:LONGEST]


def _offer(size: int, first: bool) -> Offer:
    if refusal := build.unavailable():
        return Offer(short(refusal))
    try:
        fd, token = _create(torch.ops.qwenvl_tp.region_bytes(size)) if first else (-1, "")
    except OSError as error:  # some sandboxes refuse the call
        return Offer(short(f"no memory to share: {error}"))
    return Offer(None, hash_of_boot(), os.getpid(), fd, token)


def _create(size: int) -> tuple[int, str]:
    fd = os.memfd_create("all-reduce")  # its pages come with their first use
    try:
        os.ftruncate(fd, size)
        token = secrets.token_hex(TOKEN_BYTES)
        os.pwrite(fd, bytes.fromhex(token), 0)
    except OSError:
        os.close(fd)
        raise
    return fd, token


def _open(offers: Sequence[Offer], place: int, ranks: Sequence[int], limit_s: float) -> Region | str:
    first = offers[0]
    if any(o.host != first.host for o in offers):
        return "its ranks are on several hosts, or in containers that do not see each other"
    try:
        fd = os.open(f"/proc/{first.pid}/fd/{first.fd}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if os.pread(fd, TOKEN_BYTES, 0) != bytes.fromhex(first.token):
                return f"process {first.pid} is not rank {ranks[0]} here"
            return Region(torch.ops.qwenvl_tp.region_open(fd, place, list(ranks), [o.pid for o in offers], limit_s))
        finally:
            os.close(fd)
    except (OSError, RuntimeError) as error:
        return short(f"rank {ranks[0]}'s memory cannot be opened: {str(error).splitlines()[0]}")
