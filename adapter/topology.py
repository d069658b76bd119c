"""Ranks and groups: from any launcher's environment to a process group, the tensor-parallel group and a Megatron `mpu`.

Nothing here is global but the process group torch itself keeps: groups travel as values (`TensorParallel`, `Mpu`).
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from packaging.version import Version
from torch import Tensor
from torch.utils.cpp_extension import is_ninja_available

from adapter.launchers import Launch, read_environment, usable_cores
from adapter.progress import ALL_GATHER, ALL_REDUCE, BARRIER, BROADCAST, Progress
from policies.errors import UserError

log = logging.getLogger("adapter")
TIMEOUT = timedelta(minutes=10)  # of any collective: the longest a rank may wait while another decodes a film
SHM_TRIED = Version("0.19")  # the shared-memory op of releases from here on sums every dtype
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class TensorParallel:
    """One rank's view of its tensor-parallel group. `fast` sums through DeepSpeed's shared-memory op.

    progress: where its collectives are counted for the other ranks to see; None: nowhere.
    """

    rank: int
    size: int
    group: Any = None
    fast: bool = False
    progress: Progress | None = field(default=None, compare=False, repr=False)

    def _in(self, kind: int, values: int = 0) -> AbstractContextManager[None]:
        return nullcontext() if self.progress is None else self.progress.entering(kind, values)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of `x` over the group, in place, on every rank bit for bit the same."""
        if self.size == 1:
            return x
        x = x.contiguous()  # the shared-memory op takes strided memory without reducing it
        with self._in(ALL_REDUCE, x.numel()):
            if self.fast:
                dist.inference_all_reduce(x, group=self.group)
            else:
                dist.all_reduce(x, group=self.group)
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
            dist.all_gather_into_tensor(out, x.reshape(-1), group=self.group)
        parts = out.view(self.size, *x.shape)
        return torch.cat([part[..., :n] for part, n in zip(parts, sizes, strict=True)], dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's `x` on every rank, in place."""
        if self.size > 1:
            with self._in(BROADCAST, x.numel()):
                dist.broadcast(x, src=0, group=self.group)
        return x

    def agreed(self, value: int) -> int:
        """Rank 0's `value` on every rank."""
        return int(self.broadcast(torch.tensor([value], device=get_accelerator().current_device_name())))

    def barrier(self) -> None:
        """Wait for every rank of the job."""
        with self._in(BARRIER):
            dist.barrier()


@dataclass(frozen=True)
class Mpu:
    """The tp x dp grid in the form of Megatron-LM's `mpu`, which DeepSpeed asks for. dp is 1: no replicas yet."""

    tp: TensorParallel
    data_group: Any = None

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
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> Any:
        return self.data_group


def start(tp_size: int) -> Mpu:
    """Join the job, check that it has tp_size ranks and build the groups. Safe to call again in the same process.

    Raises UserError where the world is not tp_size or the rendezvous port is taken.
    """
    launch = read_environment()
    check_world(launch.world_size, tp_size)
    if not torch.distributed.is_initialized():
        _init_process_group(launch)
    if not dist.is_initialized():
        _need_a_compiler()
        dist.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False,
                              timeout=TIMEOUT, auto_mpi_discovery=False)
    dist.barrier()  # every rank has mapped every segment, so their names can go
    _unlink_segments()
    if tp_size == 1:
        return Mpu(TensorParallel(0, 1))
    return grid(launch, tp_size)


def grid(launch: Launch, tp_size: int) -> Mpu:
    """The groups of a world of tp_size ranks; every rank must call it."""
    group = dist.new_group(list(range(tp_size)))
    alone = [dist.new_group([r]) for r in range(launch.world_size)]
    fast, why = choose_all_reduce(launch, tp_size)
    votes = TensorParallel(launch.rank, tp_size, group).all_gather_last(
        torch.tensor([fast], dtype=torch.uint8).to(get_accelerator().current_device_name()), (1,) * tp_size)
    if fast and not votes.all():
        fast, why = False, "torch group; not every rank can use DeepSpeed's shared-memory op"
    if launch.rank == 0:
        log.info("all-reduce: %s", why)
    return Mpu(TensorParallel(launch.rank, tp_size, group, fast, _make_progress()), alone[launch.rank])


def _make_progress() -> Progress | None:
    try:
        return Progress()
    except OSError as error:  # some sandboxes refuse the call
        log.warning("a rank that stalls will not be named: no shared memory to count collectives in (%s)", error)
        return None


def check_world(world_size: int, tp_size: int) -> None:
    """Raises UserError where the job does not have exactly tp_size ranks."""
    if world_size == tp_size:
        return
    more = ("replicas (data parallel x tensor parallel) are not supported yet" if world_size > tp_size
            else "each of the tp_size shards needs a rank of its own")
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    raise UserError(f"this job has {ranks}, tensor_parallel.tp_size is {tp_size}: {more}. Start "
                    f"`deepspeed --num_accelerators {tp_size} ...` or set tensor_parallel.tp_size={world_size}")


def choose_all_reduce(launch: Launch, tp_size: int) -> tuple[bool, str]:
    """Whether DeepSpeed's shared-memory op can and should sum, and why, in words."""
    if get_accelerator().device_name() != "cpu":
        return False, f"{get_accelerator().communication_backend_name()} (ranks on accelerators)"
    backend = getattr(dist.comm.cdb, "shm_comm_op", None)
    if backend is None:
        return False, "torch group; DeepSpeed's shared-memory op needs ninja and a C++ compiler on PATH"
    if Version(deepspeed.__version__) < SHM_TRIED:
        return False, (f"torch group; the shared-memory op is used from DeepSpeed {SHM_TRIED} on and this is "
                       f"{deepspeed.__version__}: 0.16.0's dies of an illegal instruction in half precision")
    if not launch.one_host or launch.world_size != tp_size:
        return False, (f"torch group; DeepSpeed's shared-memory op needs all ranks of the job on one host "
                       f"(LOCAL_SIZE {launch.local_size or 'not set'}, world {launch.world_size})")
    cores = usable_cores()
    if tp_size > cores:
        return False, f"torch group; DeepSpeed's shared-memory op spins, too slow with {tp_size} ranks on {cores} cores"
    return True, "DeepSpeed's shared-memory op"


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
        torch.distributed.init_process_group(backend, timeout=TIMEOUT, rank=launch.rank, world_size=launch.world_size)
        return
    listener = _listen(port) if launch.rank == 0 else None
    store = torch.distributed.TCPStore("127.0.0.1", port, launch.world_size, launch.rank == 0, timeout=TIMEOUT,
                                       wait_for_workers=False, master_listen_fd=listener)
    torch.distributed.init_process_group(backend, store=store, timeout=TIMEOUT, rank=launch.rank,
                                         world_size=launch.world_size)


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
