"""Ranks and groups: from any launcher's environment to a process group and the tp x dp grid, as a Megatron `mpu`.

Nothing here is global but the process group torch itself keeps: groups travel as values (`Group`, `Mpu`).
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import socket
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.bwc import bwc_tensor_model_parallel_group
from torch import Tensor
from torch.utils.cpp_extension import is_ninja_available

from adapter.all_reduce import TOKEN_BYTES, TORCH, Route, choose
from adapter.launchers import Launch, how_to_start, read_environment
from adapter.progress import ALL_GATHER, ALL_REDUCE, BARRIER, BROADCAST, Progress
from policies.errors import UserError

log = logging.getLogger("adapter")
TIMEOUT = timedelta(minutes=10)  # of any collective: the longest a rank may wait while another decodes a film
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def to_device(x: Tensor) -> Tensor:
    """`x` where this rank computes and communicates."""
    return x.to(get_accelerator().current_device_name())


@dataclass(frozen=True)
class Group:
    """One rank's view of a group of ranks.

    rank: this process's place in the group; root: which rank of the whole job has place 0.
    group: torch's; None is the whole job. route: the way it sums and gathers.
    progress: where its collectives are counted for the other ranks to see; None: nowhere.
    """

    rank: int
    size: int
    group: Any = None
    route: Route = TORCH
    root: int = 0
    progress: Progress | None = field(default=None, compare=False, repr=False)

    def _in(self, kind: int, values: int = 0) -> AbstractContextManager[None]:
        return nullcontext() if self.progress is None else self.progress.entering(kind, values)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of `x` over the group, in place, on every rank bit for bit the same."""
        if self.size == 1:
            return x
        x = x.contiguous()  # DeepSpeed's shared-memory op takes strided memory without reducing it
        with self._in(ALL_REDUCE, x.numel()):
            self.route.all_reduce(x, self.group)
        return x

    def all_gather_last(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Concatenate every rank's `x` along the last dimension, whose length on rank r is sizes[r]."""
        if self.size == 1:
            return x
        widest = max(sizes)
        if x.shape[-1] < widest:
            x = torch.nn.functional.pad(x, (0, widest - x.shape[-1]))
        out = x.new_empty(self.size * x.numel())
        with self._in(ALL_GATHER, x.numel()):
            self.route.all_gather(out, x.reshape(-1), self.group)
        parts = out.view(self.size, *x.shape)
        return torch.cat([part[..., :n] for part, n in zip(parts, sizes, strict=True)], dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """The first rank's `x` on every rank, in place."""
        if self.size > 1:
            with self._in(BROADCAST, x.numel()):
                dist.broadcast(x, src=self.root, group=self.group)
        return x

    def agreed(self, value: int) -> int:
        """The first rank's `value` on every rank."""
        return int(self.broadcast(to_device(torch.tensor([value]))))

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            with self._in(BARRIER):
                dist.barrier(group=self.group)


@dataclass(frozen=True)
class Mpu:
    """The tp x dp grid in the form of Megatron-LM's `mpu`, which DeepSpeed asks for.

    tp: the ranks that share one model; replicas: this rank's counterparts in all copies of the model, whose number is
    dp; world: every rank of the job, its collectives counted beside those of tp.

    summing: in words how tp sums, and why so.
    """

    tp: Group
    replicas: Group
    world: Group
    summing: str = ""

    def get_model_parallel_rank(self) -> int:
        return self.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self.tp.size

    def get_model_parallel_group(self) -> Any:
        return self.tp.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.replicas.rank

    def get_data_parallel_world_size(self) -> int:
        return self.replicas.size

    def get_data_parallel_group(self) -> Any:
        return self.replicas.group


def start(tp_size: int, megatron: Any = None, token_bytes: int = TOKEN_BYTES) -> Mpu:
    """Join the job, check that its ranks make whole replicas and build the groups. Safe to call again in a process.

    megatron: the caller's own Megatron-style mpu, whose groups are taken as they are. token_bytes: of a hidden state,
    what a group sums most often. Raises UserError where the world is not a multiple of tp_size or the rendezvous port
    is taken.
    """
    launch = read_environment()
    if megatron is None:
        check_world(launch.world_size, tp_size)
    if not torch.distributed.is_initialized():
        _init_process_group(launch)
        if get_accelerator().device_name() == "cpu":
            atexit.register(_leave)
    if not dist.is_initialized():
        _need_a_compiler()
        dist.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False,
                              timeout=TIMEOUT, auto_mpi_discovery=False)
    dist.barrier()  # every rank has mapped every segment, so their names can go
    _unlink_segments()
    groups = _grid(launch, tp_size) if megatron is None else _groups_of(megatron)
    return _counted(launch, token_bytes, *groups)


def _grid(launch: Launch, tp_size: int) -> tuple[Any, Any]:
    """This rank's tensor-parallel and data-parallel group, placed as Megatron-LM does: neighbours share a model. Every
    rank must call it, since torch wants every group made by all."""
    world = range(launch.world_size)
    tp = [_new_group(world[start:start + tp_size]) for start in world[::tp_size]]
    dp = [_new_group(world[place::tp_size]) for place in range(tp_size)]
    return tp[launch.rank // tp_size], dp[launch.rank % tp_size]


def _new_group(ranks: Sequence[int]) -> Any:
    return torch.distributed.new_group(list(ranks), timeout=TIMEOUT)  # DeepSpeed's would wait for torch's 30 minutes


def _groups_of(megatron: Any) -> tuple[Any, Any]:
    """The groups of a caller's mpu. Raises UserError where it lacks what Megatron-LM's has."""
    try:
        return bwc_tensor_model_parallel_group(megatron), megatron.get_data_parallel_group()
    except (AttributeError, AssertionError) as error:
        raise UserError(f"mpu={megatron!r}: {error}; it must answer get_tensor_model_parallel_group() (or "
                        "get_model_parallel_group()) and get_data_parallel_group(), its groups initialised, as "
                        "Megatron-LM's parallel_state does") from None


def tp_size_of(megatron: Any) -> int:
    """Ranks that share one model, by a caller's mpu. Raises UserError as `start` does."""
    group, _ = _groups_of(megatron)
    return torch.distributed.get_world_size(group)


def _counted(launch: Launch, token_bytes: int, tp: Any, replicas: Any) -> Mpu:
    """The grid with its collectives counted and its all-reduce chosen, on which all ranks agree."""
    progress = _make_progress() if launch.world_size > 1 else None
    world = Group(launch.rank, launch.world_size, progress=progress)
    sharing = _group(tp, progress)
    ranks = torch.distributed.get_process_group_ranks(tp)
    route, summing = choose(world, sharing, ranks, launch, token_bytes, TIMEOUT.total_seconds())
    if launch.rank == 0 and sharing.size > 1:
        log.info("all-reduce: %s", summing)
    if launch.rank == 0 and sharing.size < world.size:
        log.info("replicas: %d, of %d rank%s each", world.size // sharing.size, sharing.size, "s" * (sharing.size > 1))
    return Mpu(replace(sharing, route=route), _group(replicas), world, summing)


def _group(group: Any, progress: Progress | None = None) -> Group:
    ranks = torch.distributed.get_process_group_ranks(group)
    return Group(ranks.index(torch.distributed.get_rank()), len(ranks), group, root=ranks[0], progress=progress)


def _make_progress() -> Progress | None:
    try:
        return Progress()
    except OSError as error:  # some sandboxes refuse the call
        log.warning("a rank that stalls will not be named: no shared memory to count collectives in (%s)", error)
        return None


def check_world(world_size: int, tp_size: int) -> None:
    """Raises UserError where the ranks of the job do not make whole replicas of tp_size ranks."""
    if world_size % tp_size == 0:
        return
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    fit = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
    raise UserError(f"this job has {ranks}, tensor_parallel.tp_size is {tp_size}: each of the tp_size shards needs a "
                    "rank of its own, and more ranks must make whole replicas. Start so many, "
                    f"`{how_to_start(tp_size)}`, or a multiple, or set tensor_parallel.tp_size to one of {fit}")


def _init_process_group(launch: Launch) -> None:
    """torch's process group; a job of one host rendezvouses on loopback only, which env:// would not do."""
    backend = get_accelerator().communication_backend_name()
    if get_accelerator().device_name() != "cpu":
        if launch.local_rank >= get_accelerator().device_count():
            raise UserError(f"rank {launch.rank} is number {launch.local_rank} on its host, which has only "
                            f"{get_accelerator().device_count()} accelerators; start fewer ranks there")
        get_accelerator().set_device(launch.local_rank)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not launch.one_host or address not in LOOPBACK or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            torch.distributed.init_process_group(backend, timeout=TIMEOUT, rank=launch.rank,
                                                 world_size=launch.world_size)
        except torch.distributed.DistNetworkError as error:
            raise UserError(f"the rendezvous at {address}:{port} failed: {str(error).splitlines()[0]}. Is another job "
                            "using that port there? Start with another MASTER_PORT (deepspeed --master_port)") from None
        return
    listener = _listen(port) if launch.rank == 0 else None
    store = torch.distributed.TCPStore("127.0.0.1", port, launch.world_size, launch.rank == 0, timeout=TIMEOUT,
                                       wait_for_workers=False, master_listen_fd=listener)
    torch.distributed.init_process_group(backend, store=store, timeout=TIMEOUT, rank=launch.rank,
                                         world_size=launch.world_size)


def _leave() -> None:
    """gloo's threads may abort a process that ends in its group (pytorch#190489). After an exception it stays there:
    leaving waits for a collective that is under way, and the others may never come to it."""
    if torch.distributed.is_initialized() and not hasattr(sys, "last_value"):
        torch.distributed.destroy_process_group()


def _listen(port: int) -> int:
    """File descriptor of a socket that listens on 127.0.0.1:port; the store closes it."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        raise UserError(f"port {port} on 127.0.0.1 cannot be used ({error.strerror}); is another job running? "
                        "Start with `deepspeed --master_port N ...` and a free N") from None
    listener.listen(1024)
    return listener.detach()


def _need_a_compiler() -> None:
    """Without ninja or a compiler DeepSpeed raises where it builds its shared-memory op; tell it that it has none."""
    if not is_ninja_available() or not shutil.which(os.environ.get("CXX", "c++")):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _unlink_segments() -> None:
    """Remove the names of DeepSpeed's /dev/shm segments of this job; the mappings stay until the processes end."""
    parts = (os.getuid(), os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""), os.environ.get("RANK"))
    Path("/dev/shm", "deepspeed_allreduce_buffer_{}_{}_{}_{}".format(*parts)).unlink(missing_ok=True)
