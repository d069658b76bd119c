"""The doctor as ranks of real launchers, and with ranks of its own: what it says of such a job, and nothing left."""

from __future__ import annotations

import json
import os

import pytest
from launching import ROOT, free_port, launch

from adapter.doctor import check, job

DOCTOR = ROOT / "launch" / "doctor.py"
pytestmark = pytest.mark.ranks


def rendezvous(trial: check.Trial) -> check.Finding:
    return next(check.run([job.rendezvous], check.Case({}, trial=trial)))


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["none", "deepspeed", "mpirun"])
def test_ranks_join_and_sum(launcher):
    """Ranks that the doctor starts with DeepSpeed's launcher, or is itself; and what torch and DeepSpeed say."""
    outcome = launch(2, DOCTOR, "--json", *(["--ranks", "2"] if launcher == "none" else []), launcher=launcher)
    report = json.loads(next(line for line in outcome.out.splitlines() if line.startswith("{")))
    found, facts = {row["check"]: row for row in report["checks"]}, report["facts"]
    assert outcome.code == 0, (found, outcome.err[-3000:])
    assert "2 ranks on" in found["rendezvous"]["found"] and "2 ranks on this host" in found["threads"]["found"]
    assert "right in float32 and bfloat16" in found["all reduce"]["found"]
    assert "shared-memory op" in found["all reduce"]["found"] or "torch group" in found["all reduce"]["found"]
    assert facts["deepspeed"]["torch version"] == facts["torch"]["torch_version"] and facts["torch"]["os"]


def as_rank(monkeypatch, **variables: str) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", "CXX": "none",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **variables}.items():
        monkeypatch.setenv(name, value)


def test_mpi_that_sees_another_world(monkeypatch):
    """Ranks of an mpirun whose MPI is not mpi4py's are each alone in it. Here: its variables without an mpirun."""
    for name, value in (("SIZE", "2"), ("RANK", "0"), ("LOCAL_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    before = set(os.listdir("/dev/shm"))
    row = rendezvous(job.try_job(0, 60))
    assert row.status == check.FAILED and "started 2 processes, but mpi4py sees 1" in row.found
    assert "mpirun" in row.found and row.do == "as the message says"
    assert not [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("sm_segment")]


def test_a_rank_that_never_comes(monkeypatch):
    """Rank 0 of two, alone: an end after the limit, and how far it came."""
    as_rank(monkeypatch)
    row = rendezvous(job.try_job(0, 8))
    assert row.status == check.FAILED and "no end after" in row.found and "rank 0 was" in row.found


@pytest.mark.sweep
def test_an_interface_that_is_not_here(monkeypatch):
    as_rank(monkeypatch, WORLD_SIZE="1", LOCAL_SIZE="1", GLOO_SOCKET_IFNAME="nosuch0")
    row = rendezvous(job.try_job(0, 60))
    assert row.status == check.FAILED and "nosuch0" in row.found and "GLOO_SOCKET_IFNAME" in row.do
