"""Every launcher on one host, by the scripts of launch/launchers/: the same tokens, exit 0, nothing left."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from launching import Outcome
from scripts import finished, one_host, start, tokens

from adapter.parallel import shared_memory
from adapter.parallel.all_reduce import DEEPSPEED

pytestmark = pytest.mark.ranks
MPICH = next(Path("/usr/lib").glob("*/libmpich.so.12"), None)
ROOT_MAY = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
need_mpich = pytest.mark.skipif(not shutil.which("mpirun.mpich") or not MPICH,
                                reason="MPICH IS NOT TESTED: apt-get install mpich")


def same_answers(script: str, **env: str) -> Outcome:
    outcome = finished(start(script, 2, **env))
    assert tokens(outcome.out) == one_host()
    sums_in_shared_memory(outcome)
    return outcome


def sums_in_shared_memory(outcome: Outcome) -> None:
    """Every launcher's ranks know that they share a host: LOCAL_SIZE is right, so that both ways through memory are
    possible. Which is taken depends on what else runs here."""
    (line,) = [line for line in outcome.err.splitlines() if "all-reduce: " in line]
    assert f"not {shared_memory.NAME}" not in line, line
    refused = re.search(f"not {DEEPSPEED.name}: ([^;]*)", line)
    assert not refused or refused[1].startswith("it spins"), line  # as on one core: not for LOCAL_SIZE


@pytest.mark.long  # the quick start, the wheel and a killed rank have this launcher too
def test_deepspeed():
    same_answers("one_host.sh")


@pytest.mark.long
def test_torchrun():
    same_answers("torchrun.sh")


def test_mpirun_of_openmpi():
    same_answers("mpirun.sh", MPIRUN_ARGS="--oversubscribe", **ROOT_MAY)


@need_mpich
def test_mpirun_of_mpich(tmp_path):
    """mpi4py finds MPICH by the name that MPICH itself gives its library; Debian has another."""
    (tmp_path / "libmpi.so.12").symlink_to(MPICH)
    outcome = same_answers("mpirun.sh", MPIRUN="mpirun.mpich", MPI4PY_MPIABI="mpich", LD_LIBRARY_PATH=str(tmp_path))
    assert outcome.err.count("generating") == 2, "rank 0 alone says it, once a batch"


@need_mpich
def test_mpirun_of_another_mpi_than_mpi4py_has_is_reported():
    """Each process would take itself for the only one."""
    alone = {"OMPI_MCA_btl": "self"}  # OpenMPI outside its own mpirun leaves files in /dev/shm, whoever calls it
    job = start("mpirun.sh", 2, MPIRUN="mpirun.mpich", **alone)  # mpi4py takes the openmpi beside python
    outcome = job.finish(120)
    assert outcome.code != 0 and "Traceback" not in outcome.err
    assert "started 2 processes, but mpi4py sees 1: it uses another MPI, Open MPI" in outcome.err, outcome.err[-3000:]
    assert not job.leftovers()


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("numactl"), reason="--bind_cores_to_rank IS NOT TESTED: apt-get install numactl")
def test_cores_bound_to_ranks():
    same_answers("bind_cores.sh")
