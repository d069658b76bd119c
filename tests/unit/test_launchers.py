"""Launchers' environments: what each says, what is set for torch and DeepSpeed, and what is refused."""

from __future__ import annotations

import logging
import socket
import sys
from types import SimpleNamespace

import psutil
import pytest

from adapter.parallel import network
from adapter.parallel.launchers import (
    SLURM_PORTS,
    Launch,
    environment_rank,
    first_host,
    how_to_start,
    launcher_of,
    read_environment,
    slurm_port,
    tasks_per_node,
)
from policies.errors import UserError

RENDEZVOUS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TORCH = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **RENDEZVOUS}
DEEPSPEED = {**TORCH, "LOCAL_SIZE": "2", "CROSS_RANK": "0", "CROSS_SIZE": "1"}
TORCHRUN = {**TORCH, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PALS = {"PMI_RANK": "1", "PMI_SIZE": "2", "PALS_LOCAL_RANKID": "1"}
# as srun of Slurm 22.05 sets them: two hosts, ranks 0-1 and 2-3
SRUN = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": "n[08-09]",
        "SLURM_NTASKS": "4", "PMI_SIZE": "4", "PMI_RANK": "3"}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
# deepspeed --launcher mpich: its helper sets RANK and LOCAL_RANK, hydra the rest
DEEPSPEED_MPICH = {**HYDRA, **TORCH, "LOCAL_SIZE": "2"}
ALL = {"deepspeed": DEEPSPEED, "torchrun": TORCHRUN, "mpirun (OpenMPI)": OPENMPI, "mpirun (MPICH or Intel MPI)": HYDRA,
       "srun": SRUN, "mpiexec": PALS, "the launcher": {**TORCH, "LOCAL_SIZE": "2"}, "no launcher": BATCH_SCRIPT}


@pytest.fixture
def net(monkeypatch):
    """A host hB with three interfaces and a way to hA over ib0; `routes`: address -> own address towards it."""
    addresses = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.2", "fe80::2%eth0"], "ib0": ["10.1.0.2"],
                 "docker0": ["172.17.0.1"]}
    state = SimpleNamespace(routes={"10.1.0.1": "10.1.0.2"}, addresses=addresses,
                            names={"hA": "10.1.0.1", "n08": "10.1.0.1", "hB": "127.0.1.1", "10.0.0.2": "10.0.0.2"})

    def resolve(address: str) -> tuple[int, tuple]:
        return socket.AF_INET, (state.names.get(address, address), 9)

    def towards(address: str) -> str:
        target = resolve(address)[1][0]
        if target.startswith("127."):
            return "127.0.0.1"
        if target not in state.routes:
            raise UserError(f"host hB has no route to MASTER_ADDR {address}")
        return state.routes[target]

    family = {True: socket.AF_INET6, False: socket.AF_INET}
    monkeypatch.setattr(network, "_resolve", resolve)
    monkeypatch.setattr(network, "own_address_towards", towards)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {
        name: [SimpleNamespace(family=family[":" in a], address=a) for a in state.addresses[name]]
        for name in state.addresses})
    monkeypatch.setattr(psutil, "net_if_stats",
                        lambda: {name: SimpleNamespace(isup=True) for name in state.addresses})
    monkeypatch.setattr(socket, "gethostname", lambda: "hB")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: state.names[name])
    return state


@pytest.fixture
def mpi(monkeypatch):
    """mpi4py in a job of `size` processes of which this is rank 0 and `local` are on its host."""
    state = SimpleNamespace(size=2, local=2)

    def communicator(size: int) -> SimpleNamespace:
        return SimpleNamespace(Get_size=lambda: size, Get_rank=lambda: 0, bcast=lambda value, root: value,
                               Split_type=lambda kind: communicator(state.local))

    class Library:
        COMM_TYPE_SHARED = 0
        Get_library_version = staticmethod(lambda: "Open MPI v5.0.11, package: Open MPI user@localhost Distribution")

        @property
        def COMM_WORLD(self):
            return communicator(state.size)

    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=Library()))
    return state


@pytest.mark.parametrize("name", ALL)
def test_launcher_and_rank_are_known_before_anything_is_read(name):
    assert launcher_of(ALL[name]).name == name
    expected = {"srun": 3, "no launcher": 0}.get(name, 1)
    assert environment_rank("RANK", ALL[name]) == expected
    assert environment_rank("LOCAL_RANK", ALL[name]) == min(expected, 1)


def test_rank_that_is_no_number_is_not_known_yet():
    """Who reports an error is asked before anything is judged."""
    assert environment_rank("RANK", {**TORCH, "RANK": "one"}) == 0


def test_launchers_started_by_others():
    """torchrun or deepspeed in a step of srun; mpirun under Slurm; deepspeed's mpich and impi over hydra."""
    for inner, outer in ((TORCHRUN, SRUN), (DEEPSPEED, SRUN), (OPENMPI, SRUN), (HYDRA, SRUN), (TORCHRUN, OPENMPI)):
        assert launcher_of({**outer, **inner}) is launcher_of(inner)
        assert environment_rank("RANK", {**outer, **inner}) == 1
    assert read_environment(dict(DEEPSPEED_MPICH)) == Launch(1, 2, 1, 2)


@pytest.mark.parametrize("name, words", [("deepspeed", "deepspeed --num_accelerators 4"), ("srun", "srun --ntasks 4"),
                                         ("torchrun", "--nproc-per-node 4"), ("mpirun (OpenMPI)", "mpirun -n 4")])
def test_how_to_start_more(name, words):
    assert words in how_to_start(4, ALL[name])


def test_deepspeed_launcher():
    assert read_environment(dict(DEEPSPEED)) == Launch(1, 2, 1, 2)


def test_torchrun_gets_the_local_size_that_the_shared_memory_op_needs():
    environ = dict(TORCHRUN)
    assert read_environment(environ) == Launch(1, 2, 1, 2)
    assert environ["LOCAL_SIZE"] == "2"


@pytest.mark.parametrize("environ", [{}, BATCH_SCRIPT])
def test_no_launcher_is_one_rank(environ):
    """In the script of a Slurm job, too: its own process is no task."""
    environ = dict(environ)
    assert read_environment(environ) == Launch(0, 1, 0, 1)
    assert environ["MASTER_ADDR"] == "127.0.0.1" and environ["MASTER_PORT"].isdecimal()


def test_srun_over_two_hosts(net):
    environ = dict(SRUN)
    assert read_environment(environ) == Launch(3, 4, 1, 2)
    assert environ["MASTER_ADDR"] == "n08" and int(environ["MASTER_PORT"]) in SLURM_PORTS
    assert environ["GLOO_SOCKET_IFNAME"] == environ["NCCL_SOCKET_IFNAME"] == "ib0"
    assert read_environment(environ) == Launch(3, 4, 1, 2), "again"


def test_srun_on_one_host_stays_on_loopback():
    environ = {**SRUN, "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "4"}
    assert read_environment(environ) == Launch(3, 4, 1, 4)
    assert environ["MASTER_ADDR"] == "127.0.0.1" and environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_srun_with_uneven_hosts_and_a_rendezvous_of_the_users(net):
    environ = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1(x2),2", "SLURM_NODEID": "2", "MASTER_ADDR": "hA",
               "MASTER_PORT": "4711"}
    assert read_environment(environ) == Launch(3, 4, 1, 2)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("hA", "4711")


def test_srun_that_says_too_little():
    with pytest.raises(UserError, match=r"srun.*SLURM_STEP_NODELIST"):
        read_environment({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"})
    with pytest.raises(UserError, match=r"srun.*tasks per node"):
        read_environment({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "two"})


@pytest.mark.parametrize("text, first", [
    ("n1", "n1"), ("n1,n2", "n1"), ("n[3,5-9],m1", "n3"), ("n[03-05,9]-[1-2],m1", "n03-1"), ("a-b.c[010]", "a-b.c010"),
    ("r[1-2]n[4,6],x", "r1n4"),
])
def test_first_host_of_a_slurm_list(text, first):
    assert first_host(text) == first


def test_no_host_in_a_slurm_list():
    with pytest.raises(ValueError, match="host list"):
        first_host("")


@pytest.mark.parametrize("text, counts", [("2", [2]), ("2(x3),1", [2, 2, 2, 1]), ("1,4(x2)", [1, 4, 4])])
def test_tasks_per_node(text, counts):
    assert tasks_per_node(text) == counts


def test_slurm_ports_of_neighbours_differ():
    ports = [slurm_port(job, step) for job in (1, 2, 999_999, 1_000_000) for step in range(20)]
    assert len(set(ports)) == len(ports) and set(ports) <= set(SLURM_PORTS)


@pytest.mark.parametrize("environ", [OPENMPI, HYDRA, PALS])
def test_mpirun_on_one_host(mpi, environ):
    environ = dict(environ)
    assert read_environment(environ) == Launch(0, 2, 0, 2)
    assert environ["MASTER_ADDR"] == "127.0.0.1" and environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_mpirun_over_two_hosts_gives_an_address_others_can_reach(mpi, net):
    """The host's own name is loopback to itself: the address on the way out, or its one other interface's."""
    mpi.local = 1
    net.routes = {network.NOBODY: "10.0.0.2", "10.0.0.2": "10.0.0.2"}
    environ = dict(OPENMPI)
    assert read_environment(environ) == Launch(0, 2, 0, 1)
    assert environ["MASTER_ADDR"] == "10.0.0.2" and environ["GLOO_SOCKET_IFNAME"] == "eth0"
    net.routes = {"10.1.0.2": "10.1.0.2"}
    net.addresses = {"lo": ["127.0.0.1"], "ib0": ["fe80::1", "10.1.0.2"]}
    environ = dict(OPENMPI)
    read_environment(environ)
    assert environ["MASTER_ADDR"] == "10.1.0.2" and environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_mpirun_keeps_a_rendezvous_of_the_users(mpi, net):
    mpi.local = 1
    environ = {**OPENMPI, "MASTER_ADDR": "10.1.0.1", "MASTER_PORT": "4711"}
    read_environment(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.1.0.1", "4711")


def test_mpirun_of_another_mpi(mpi):
    mpi.size = 1
    with pytest.raises(UserError, match=r"Intel MPI.* started 2 .*sees 1: it uses another MPI, Open MPI v5.0.11\."):
        read_environment(dict(HYDRA))


def test_mpirun_without_mpi4py(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"mpirun \(OpenMPI\).*pip install mpi4py"):
        read_environment(dict(OPENMPI))


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_incomplete_environment_names_what_is_missing(missing):
    with pytest.raises(UserError, match=f"{missing} not set"):
        read_environment({k: v for k, v in TORCH.items() if k != missing})


@pytest.mark.parametrize("change, words", [
    ({"RANK": "2"}, "RANK=2, WORLD_SIZE=2.*do not agree"), ({"LOCAL_SIZE": "3"}, "LOCAL_SIZE=3.*do not agree"),
    ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2.*do not agree"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two.*whole numbers"),
    ({"MASTER_PORT": "x"}, "MASTER_PORT=x.*whole numbers"),
])
def test_environment_that_contradicts_itself(change, words):
    with pytest.raises(UserError, match=words):
        read_environment({**DEEPSPEED, **change})


def several(**change: str) -> dict[str, str]:
    """Rank 2 of 4, the first of two ranks on the second host."""
    return {**DEEPSPEED, "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "hA", **change}


def test_a_job_of_one_host_stays_on_loopback():
    environ = dict(DEEPSPEED)
    read_environment(environ)
    assert environ["GLOO_SOCKET_IFNAME"] == "lo" and "NCCL_SOCKET_IFNAME" not in environ


def test_several_hosts_use_the_interface_that_leads_to_the_first(net):
    environ = several()
    read_environment(environ)
    assert environ["GLOO_SOCKET_IFNAME"] == environ["NCCL_SOCKET_IFNAME"] == "ib0"


def test_interfaces_of_the_users_stay(net):
    environ = several(GLOO_SOCKET_IFNAME="eth0", MASTER_ADDR="10.9.9.9")
    read_environment(environ)
    assert environ["GLOO_SOCKET_IFNAME"] == "eth0" and "NCCL_SOCKET_IFNAME" not in environ
    environ = several(NCCL_SOCKET_IFNAME="=mlx")
    read_environment(environ)
    assert environ["GLOO_SOCKET_IFNAME"] == "ib0" and environ["NCCL_SOCKET_IFNAME"] == "=mlx"


def test_no_route_to_the_first_host(net):
    with pytest.raises(UserError, match=r"hB has no route to MASTER_ADDR 10.9.9.9"):
        read_environment(several(MASTER_ADDR="10.9.9.9"))


def test_own_name_that_is_loopback(net):
    """One other interface: it is meant. Several: a question, with their names."""
    first = several(RANK="0", MASTER_ADDR="hB")
    with pytest.raises(UserError, match=r"MASTER_ADDR hB is loopback on host hB .*\(docker0, eth0, ib0\)"):
        read_environment(dict(first))
    net.addresses = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"]}
    read_environment(first)
    assert first["GLOO_SOCKET_IFNAME"] == "eth0"


def test_loopback_for_several_hosts_is_warned_of(net, caplog):
    environ = several(MASTER_ADDR="localhost")
    read_environment(environ)
    assert "GLOO_SOCKET_IFNAME" not in environ
    assert "2 of the 4 ranks are not on this host (hB)" in caplog.text


def test_rank_0_on_a_host_without_the_address_is_warned_of(net, caplog):
    """The second host was given --node_rank 0 as well."""
    read_environment(several(RANK="0"))
    assert "rank 0 is on host hB, which does not have MASTER_ADDR hA" in caplog.text


def test_rank_0_says_which_interface(net, caplog):
    net.routes["10.0.0.2"] = "10.0.0.2"
    caplog.set_level(logging.INFO, "adapter")
    read_environment(several(RANK="0", MASTER_ADDR="10.0.0.2"))
    assert "interface eth0, which leads to MASTER_ADDR 10.0.0.2" in caplog.text and "does not have" not in caplog.text


def test_addresses_of_this_machine():
    """No stand-ins: loopback and a name that nobody has."""
    assert network.is_own("127.0.0.1") and network.is_own("localhost")
    assert network.own_address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(UserError, match=r"no-such-host\.invalid cannot be resolved"):
        network.interface_to("no-such-host.invalid")
