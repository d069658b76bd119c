"""Which launcher started this process, and what it says of the job: any launcher's environment -> a `Launch`."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

import deepspeed.comm as dist

from policies.errors import UserError

MPI_MARKS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class Launch:
    """Where this process stands in its job. local_size: ranks of the job on this host."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int

    @property
    def one_host(self) -> bool:
        return self.local_size == self.world_size


def read_environment(environ: MutableMapping[str, str] = os.environ) -> Launch:
    """Understand the launcher (deepspeed, torchrun, mpirun, none) and set what torch and DeepSpeed read.

    Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT where the launcher did not, and LOCAL_SIZE, without
    which DeepSpeed's shared-memory all-reduce crashes under torchrun and mpirun. Raises UserError where one is missing.
    """
    if "RANK" not in environ and any(mark in environ for mark in MPI_MARKS):
        _discover_mpi(environ)
    elif "RANK" not in environ:
        environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(free_port()))
    environ.setdefault("LOCAL_RANK", "0")
    local_size = environ.get("LOCAL_SIZE")
    if not local_size and not dist.is_initialized():  # later is too late: the op has set itself up without it
        local_size = environ.get("LOCAL_WORLD_SIZE")
        environ.update({"LOCAL_SIZE": local_size} if local_size else {})
    try:
        launch = Launch(int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ["LOCAL_RANK"]),
                        int(local_size or 0))
    except (KeyError, ValueError) as error:
        raise UserError(f"the launcher's environment is incomplete ({error}); start with the deepspeed launcher, "
                        "torchrun or mpirun") from None
    if launch.one_host:
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a job of one host does not listen on the network
    return launch


def _discover_mpi(environ: MutableMapping[str, str]) -> None:
    """mpirun gives no rendezvous: rank 0 picks a free port and tells the others. Loopback where all share a host."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(f"started by mpirun, but mpi4py cannot be used ({error}); pip install mpi4py") from None
    world = MPI.COMM_WORLD
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_host = host.Get_size() == world.Get_size()
    address = "127.0.0.1" if one_host else socket.gethostbyname(socket.gethostname())
    address, port = world.bcast((address, free_port()), root=0)
    environ.update(RANK=str(world.Get_rank()), WORLD_SIZE=str(world.Get_size()), LOCAL_RANK=str(host.Get_rank()),
                   LOCAL_SIZE=str(host.Get_size()), MASTER_ADDR=address, MASTER_PORT=str(port))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def usable_cores() -> int:
    """Cores of this host, or as many as the container's CPU quota (cgroup v2) is worth."""
    cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return cores
