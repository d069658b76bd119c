"""The doctor as ranks of real launchers, and with ranks of its own: what it says of such a job, and nothing left."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict

import pytest
from launching import ROOT, free_port, launch

from adapter.doctor import check, job, machine, main

DOCTOR = ROOT / "launch" / "doctor.py"
pytestmark = pytest.mark.ranks


def rows(out: str) -> dict[str, dict]:
    return {row["check"]: row for row in json.loads(next(x for x in out.splitlines() if x.startswith("{")))["checks"]}


def rendezvous(trial: check.Trial) -> check.Finding:
    return next(check.run([job.rendezvous], check.Case({}, trial=trial)))


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("mpirun", marks=pytest.mark.sweep)])
def test_as_ranks(launcher):
    outcome = launch(2, DOCTOR, "--json", launcher=launcher)
    found = rows(outcome.out)
    assert outcome.code == 0, (found, outcome.err[-3000:])
    assert "2 ranks on" in found["rendezvous"]["found"]
    assert "right in float32 and bfloat16" in found["all reduce"]["found"]
    assert "shared-memory op" in found["all reduce"]["found"] or "torch group" in found["all reduce"]["found"]
    assert "rank 1 on" in found["binding"]["found"]


def test_ranks_of_its_own():
    """And the facts that torch and DeepSpeed report of themselves."""
    outcome = launch(1, DOCTOR, "--ranks", "2", "--json", launcher="none")
    found = rows(outcome.out)
    facts = json.loads(outcome.out.splitlines()[-1])["facts"]
    assert facts["ds_report"]["torch version"] == facts["torch"]["version"] and facts["system"]["os"]
    assert outcome.code == 0, (found, outcome.err[-3000:])
    assert "2 ranks on" in found["rendezvous"]["found"] and found["all reduce"]["status"] == "ok"


def test_mpi_that_sees_another_world(monkeypatch):
    """Ranks of an mpirun whose MPI is not mpi4py's are each alone in it. Here: its variables without an mpirun."""
    for name, value in (("SIZE", "2"), ("RANK", "0"), ("LOCAL_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    before = set(os.listdir("/dev/shm"))
    row = rendezvous(job.try_job(machine.place(os.environ), 0, 60, []))
    assert row.status == check.FAILED and "started 2 processes, but mpi4py sees 1" in row.found and "mpirun" in row.do
    assert not [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("sm_segment")]


def as_rank(rank: int, port: int, local_rank: int, local_size: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(local_rank), "LOCAL_SIZE": str(local_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "CXX": "none"}


def test_a_rank_that_never_comes(monkeypatch):
    """Rank 0 of two, alone: an end after the limit, and how far it came."""
    for name, value in as_rank(0, free_port(), 0, 2).items():
        monkeypatch.setenv(name, value)
    trial = job.try_job(machine.place(os.environ), 0, 8, [])
    row = rendezvous(trial)
    assert row.status == check.FAILED and "no end after" in row.found and "rank 0 was" in row.found


def test_what_another_host_found_reaches_rank_0(monkeypatch):
    """Two ranks, each local rank 0: as on two hosts."""
    port, found = free_port(), asdict(check.Finding("dev shm", check.FAILED, "64 MB", "more"))
    other = subprocess.Popen([sys.executable, "-m", "adapter.doctor.trial"], stdin=subprocess.PIPE,
                             cwd=ROOT, env={**os.environ, **as_rank(1, port, 0, 1)}, text=True)
    try:
        other.stdin.write(json.dumps([found]))
        other.stdin.close()
        for name, value in as_rank(0, port, 0, 1).items():
            monkeypatch.setenv(name, value)
        trial = job.try_job(machine.place(os.environ), 0, 80, [])
        assert rendezvous(trial).status == check.OK, trial
        others = main._of_other_hosts(trial.ranks)
        assert [(row.check, row.status, row.do) for row in others] == [
            (f"dev shm on {socket.gethostname()}", check.FAILED, "more")]
        assert other.wait(30) == 0
    finally:
        other.kill()
        other.wait()
