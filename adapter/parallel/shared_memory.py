"""Memory that a group's ranks on one host share, to sum and gather through (csrc/shared_memory.cpp).

It has no name, so nothing of it can be left behind: the first rank makes a memory file, the others open it through
/proc. All ranks of the job use it, or none does: what a rank cannot do it sends to the others, and none waits for it.
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
from policies.errors import CheckFailed

NAME = "the adapter's shared memory"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that it sums, in float32; it gathers all
TOKEN_BYTES = 16


class UnlikeSteps(CheckFailed):
    """The ranks of a group are in unlike collectives; raised on every rank of it, by its shared memory."""

    def __init__(self, unlike: ValueError) -> None:
        """unlike: what the operators raise, which has the C++ stack after its first line."""
        super().__init__(f"{str(unlike).splitlines()[0]}. tensor_parallel.desync_check=1 finds where they part")


@dataclass(frozen=True)
class Region:
    """One group's memory, mapped by this rank until nobody holds it any more. handle: what the operators take."""

    handle: int

    def __post_init__(self) -> None:
        weakref.finalize(self, torch.ops.qwenvl_tp.region_close, self.handle).atexit = False

    def all_reduce(self, x: Tensor, group: Any) -> None:
        """Sum in place; dtypes that it does not sum go through torch's `group`, as DeepSpeed's own op has it.

        Raises UnlikeSteps.
        """
        if x.dtype not in DTYPES:
            dist.all_reduce(x, group=group)
            return
        try:
            torch.ops.qwenvl_tp.all_reduce_.default(x, self.handle)
        except ValueError as unlike:
            raise UnlikeSteps(unlike) from unlike

    def all_gather(self, out: Tensor, x: Tensor, group: Any) -> None:
        """Every rank's `x`, in turn, into `out`. Raises UnlikeSteps."""
        try:
            torch.ops.qwenvl_tp.all_gather_.default(out, x, self.handle)
        except ValueError as unlike:
            raise UnlikeSteps(unlike) from unlike


@dataclass(frozen=True)
class Offer:
    """What a rank sends the others. refusal: why it cannot share memory. fd, token: of a group's first rank, the file
    in its process and the file's first bytes."""

    refusal: str | None
    host: int = 0
    pid: int = 0
    fd: int = -1
    token: str = ""


def join(world: Group, index: int, ranks: Sequence[int], limit_s: float) -> Region | str:
    """The memory of the group that has this rank at `index` of `ranks` (numbers in the world), or in words why there
    is none, for any group. Every rank must call it. limit_s: how long a rank may wait for another in a collective."""
    mine = _offer(len(ranks), index == 0)
    try:
        offers = [Offer(**facts) for facts in exchange(world, asdict(mine))]
        if refusal := common([o.refusal for o in offers]):
            return refusal
        region = _open([offers[r] for r in ranks], index, ranks, limit_s)
        refused = region if isinstance(region, str) else None
        return common([facts["refusal"] for facts in exchange(world, {"refusal": refused})]) or region
    finally:
        if mine.fd >= 0:
            os.close(mine.fd)  # every rank has opened it by now, or will not


def common(refusals: Sequence[str | None]) -> str | None:
    """What the ranks refuse, in words; None where none does."""
    stated = {r: refusal for r, refusal in enumerate(refusals) if refusal}
    if len(stated) == len(refusals) and len(set(stated.values())) == 1:
        return stated[0]
    return "; ".join(f"rank {r}: {refusal}" for r, refusal in stated.items()) or None


def _offer(size: int, first: bool) -> Offer:
    if refusal := build.unavailable():
        return Offer(refusal)
    try:
        fd, token = _create(torch.ops.qwenvl_tp.region_bytes(size)) if first else (-1, "")
    except OSError as error:  # some sandboxes refuse the call
        return Offer(f"no memory to share: {error}")
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


def _open(offers: Sequence[Offer], index: int, ranks: Sequence[int], limit_s: float) -> Region | str:
    first = offers[0]
    if any(o.host != first.host for o in offers):
        return "its ranks are on several hosts, or in containers that do not see each other"
    try:
        fd = os.open(f"/proc/{first.pid}/fd/{first.fd}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if os.pread(fd, TOKEN_BYTES, 0) != bytes.fromhex(first.token):
                return f"process {first.pid} is not rank {ranks[0]} here"
            return Region(torch.ops.qwenvl_tp.region_open(fd, index, list(ranks), [o.pid for o in offers], limit_s))
        finally:
            os.close(fd)
    except (OSError, RuntimeError) as error:
        return f"rank {ranks[0]}'s memory cannot be opened: {str(error).splitlines()[0]}"
