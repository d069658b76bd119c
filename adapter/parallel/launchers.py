"""Which launcher started this process, and how it describes the job: any launcher's environment -> a `Launch`.

Imports neither torch nor DeepSpeed, so that a command can ask for its rank before anything slow.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

from adapter.parallel import network
from policies.errors import UserError

log = logging.getLogger("adapter")
Environ = MutableMapping[str, str]
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
DEEPSPEED_COMMAND = "deepspeed --num_accelerators {n} ..."
SLURM_PORTS = range(20000, 30000)  # below the ports that kernels give to outgoing connections


@dataclass(frozen=True)
class Launch:
    """The numbers of this process in its job. local_size: ranks of the job on this host, 0 if that is not known."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int

    @property
    def one_host(self) -> bool:
        return self.local_size == self.world_size


@dataclass(frozen=True)
class Launcher:
    """How one launcher is recognised, which variables give a rank's numbers, and the command that starts n ranks.

    mark: a variable in every process that it starts, and not by those below it in the table.
    discover: sets RANK and the rest where the launcher itself does not.
    """

    name: str
    mark: str
    rank: str
    world_size: str
    local_rank: str
    start: str
    discover: Callable[[Launcher, Environ], None] | None = None


def read_environment(environ: Environ = os.environ) -> Launch:
    """Understand the launcher and set what torch and DeepSpeed read. Safe to call again.

    Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT where the launcher did not; LOCAL_SIZE, without which
    DeepSpeed's shared-memory all-reduce crashes under torchrun and mpirun; GLOO_SOCKET_IFNAME (and NCCL's, for several
    hosts) where the user did not. Raises UserError for an environment that cannot become a job.
    """
    launcher = launcher_of(environ)
    if "RANK" not in environ and launcher.discover:
        launcher.discover(launcher, environ)
    environ.setdefault("LOCAL_RANK", "0")
    if not environ.get("LOCAL_SIZE") and environ.get("LOCAL_WORLD_SIZE") and not _joined():
        environ["LOCAL_SIZE"] = environ["LOCAL_WORLD_SIZE"]  # later is too late: the op has set itself up without it
    launch = _checked(launcher, environ)
    if not environ.get("GLOO_SOCKET_IFNAME") and not _joined():
        if launch.one_host:
            environ["GLOO_SOCKET_IFNAME"] = "lo"  # a job of one host does not listen on the network
        else:
            _choose_interface(launch, environ)
    return launch


def launcher_of(environ: Mapping[str, str] = os.environ) -> Launcher:
    return next(launcher for launcher in LAUNCHERS if launcher.mark in environ or not launcher.mark)


def environment_rank(name: str, environ: Mapping[str, str] = os.environ) -> int:
    """RANK or LOCAL_RANK by the variables of whichever launcher there is, before `read_environment` has judged them; 0
    where there is none or it is no number."""
    launcher = launcher_of(environ)
    own = {"RANK": launcher.rank, "LOCAL_RANK": launcher.local_rank}[name]
    stated = environ.get(name) or environ.get(own) or "0"
    return int(stated) if stated.isdecimal() else 0


def how_to_start(ranks: int, environ: Mapping[str, str] = os.environ) -> str:
    """The command that starts so many ranks with the launcher that started this one."""
    return launcher_of(environ).start.format(n=ranks)


def launcher_known(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher's own variables are set; RANK alone, which `read_environment` sets too, is none's."""
    return launcher_of(environ).mark not in ("", "RANK")


def _joined() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _checked(launcher: Launcher, environ: Environ) -> Launch:
    """Raises UserError where a variable is missing, is no number, or two do not agree."""
    if missing := [name for name in NEEDED if not environ.get(name)]:
        raise UserError(f"the environment of {launcher.name} is incomplete: {', '.join(missing)} not set. Start with "
                        "the deepspeed launcher, torchrun, mpirun or srun, or set what is missing")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    values = [environ.get(name) or "0" for name in names]
    stated = ", ".join(f"{name}={environ.get(name, '')}" for name in (*names, "MASTER_PORT"))
    if not all(value.isdecimal() for value in (*values, environ["MASTER_PORT"])):
        raise UserError(f"{stated}: whole numbers are needed")
    launch = Launch(*map(int, values))
    if launch.rank >= launch.world_size or launch.local_size > launch.world_size or (
            launch.local_size and launch.local_rank >= launch.local_size):
        raise UserError(f"{stated}: these do not agree. Is one of them exported in a shell or a startup file?")
    return launch


def _alone(launcher: Launcher, environ: Environ) -> None:
    environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1",
                   MASTER_PORT=str(network.free_port()))


def _discover_mpi(launcher: Launcher, environ: Environ) -> None:
    """mpirun gives no rendezvous: rank 0 picks a free port and sends it to the others. Loopback on one host."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter: no MPI library
        raise UserError(f"started by {launcher.name}, but mpi4py cannot be used ({error}): pip install mpi4py, and "
                        "have that MPI's libmpi on LD_LIBRARY_PATH") from None
    world = MPI.COMM_WORLD
    started = int(environ[launcher.world_size])
    if world.Get_size() != started:
        library = re.split("[,\n]", MPI.Get_library_version())[0]
        raise UserError(f"{launcher.name} started {started} processes, but mpi4py sees {world.Get_size()}: it uses "
                        f"another MPI, {library}. Start with the mpirun of that one, or let mpi4py use this one "
                        "(MPI4PY_MPIABI=openmpi or mpich, and its libmpi on LD_LIBRARY_PATH)")
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_host = host.Get_size() == started
    rendezvous = None
    if world.Get_rank() == 0:
        rendezvous = (environ.get("MASTER_ADDR") or ("127.0.0.1" if one_host else network.own_address()),
                      environ.get("MASTER_PORT") or str(network.free_port()))
    address, port = world.bcast(rendezvous, root=0)
    environ.update(RANK=str(world.Get_rank()), WORLD_SIZE=str(started), LOCAL_RANK=str(host.Get_rank()),
                   LOCAL_SIZE=str(host.Get_size()), MASTER_ADDR=address, MASTER_PORT=port)


def _discover_slurm(launcher: Launcher, environ: Environ) -> None:
    """srun's own variables give everything but a port, which the job's and step's numbers give.

    mpi4py is not asked, even where srun offers PMI: an MPI without Slurm support ends the process at its start.
    """
    try:
        world_size = environ["SLURM_STEP_NUM_TASKS"]
        local_size = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
        port = slurm_port(int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"]))
        first = first_host(environ["SLURM_STEP_NODELIST"])
        environ.update(RANK=environ["SLURM_PROCID"], LOCAL_RANK=environ["SLURM_LOCALID"], WORLD_SIZE=world_size,
                       LOCAL_SIZE=str(local_size))
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"started by srun, but its environment is incomplete ({error})") from None
    environ.setdefault("MASTER_ADDR", "127.0.0.1" if str(local_size) == world_size else first)
    environ.setdefault("MASTER_PORT", str(port))


def tasks_per_node(text: str) -> list[int]:
    """Slurm's "2(x3),1" -> [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            raise ValueError(f"{text!r} is not Slurm's form of tasks per node")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def first_host(nodelist: str) -> str:
    """The first name of a Slurm host list: "n[03-05,9]-[1-2],m1" -> "n03-1"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if not first:
        raise ValueError(f"{nodelist!r} is not a Slurm host list")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def slurm_port(job: int, step: int) -> int:
    """One port of SLURM_PORTS for a step. Steps of a job, and jobs of about the same time, get different ones."""
    return SLURM_PORTS[(31 * job + step) % len(SLURM_PORTS)]


def _choose_interface(launch: Launch, environ: Environ) -> None:
    """Set GLOO_SOCKET_IFNAME to the interface that leads to MASTER_ADDR, and warn of what in that address looks wrong.

    Left alone, gloo takes what this host's name resolves to: often a loopback address (Debian's 127.0.1.1) or a bridge
    of containers, where the other hosts do not find it.
    """
    address = environ["MASTER_ADDR"]
    if address in network.LOOPBACK_NAMES:
        if launch.local_size and launch.local_rank == 0:
            log.warning("MASTER_ADDR is %s, which is each host itself, but %d of the %d ranks are not on this host "
                        "(%s) and will not find rank 0 there. Give --master_addr the address of the first host",
                        address, launch.world_size - launch.local_size, launch.world_size, socket.gethostname())
        return
    if launch.rank == 0 and not network.is_own(address):
        log.warning("rank 0 is on host %s, which does not have MASTER_ADDR %s: the others look for it there. Were two "
                    "hosts given the same --node_rank?", socket.gethostname(), address)
    if name := network.interface_to(address):
        environ["GLOO_SOCKET_IFNAME"] = name
        environ.setdefault("NCCL_SOCKET_IFNAME", name)
        if launch.rank == 0:
            log.info("network: interface %s, which leads to MASTER_ADDR %s", name, address)


def _sets_torch_variables(name: str, mark: str, start: str) -> Launcher:
    """A launcher that sets the variables that torch reads."""
    return Launcher(name=name, mark=mark, rank="RANK", world_size="WORLD_SIZE", local_rank="LOCAL_RANK", start=start)


LAUNCHERS = (  # in the order in which they are looked for: a launcher may itself have been started by one further down
    _sets_torch_variables(name="deepspeed", mark="CROSS_SIZE", start=DEEPSPEED_COMMAND),
    _sets_torch_variables(name="torchrun", mark="TORCHELASTIC_RUN_ID", start="torchrun --nproc-per-node {n} ..."),
    Launcher(name="mpirun (OpenMPI)", mark="OMPI_COMM_WORLD_SIZE", rank="OMPI_COMM_WORLD_RANK",
             world_size="OMPI_COMM_WORLD_SIZE", local_rank="OMPI_COMM_WORLD_LOCAL_RANK", start="mpirun -n {n} ...",
             discover=_discover_mpi),
    Launcher(name="mpirun (MPICH or Intel MPI)", mark="MPI_LOCALNRANKS", rank="PMI_RANK", world_size="PMI_SIZE",
             local_rank="MPI_LOCALRANKID", start="mpirun -n {n} ...", discover=_discover_mpi),
    Launcher(name="srun", mark="SLURM_STEP_NUM_TASKS", rank="SLURM_PROCID", world_size="SLURM_STEP_NUM_TASKS",
             local_rank="SLURM_LOCALID", start="srun --ntasks {n} ...", discover=_discover_slurm),
    Launcher(name="mpiexec", mark="PMI_SIZE", rank="PMI_RANK", world_size="PMI_SIZE", local_rank="PALS_LOCAL_RANKID",
             start="mpiexec -n {n} ...", discover=_discover_mpi),
    _sets_torch_variables(name="the launcher", mark="RANK", start=DEEPSPEED_COMMAND),
    Launcher(name="no launcher", mark="", rank="RANK", world_size="WORLD_SIZE", local_rank="LOCAL_RANK",
             start=DEEPSPEED_COMMAND, discover=_alone),
)
