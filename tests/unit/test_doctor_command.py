"""The doctor's command: its report, its exit codes, and what it does where things are broken."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time

import pytest
from launching import ROOT

from adapter.commands.common import CHECK_FAILED, DONE, GRACE_S
from adapter.doctor import check, host, main, report
from adapter.doctor.check import FAILED, OK, WARNING, Case, Finding, Trial
from adapter.parallel import cpu


def test_a_check_that_breaks_or_hangs_is_a_row(monkeypatch):
    def breaks(case: Case):
        raise KeyError("x")

    def hangs(case: Case):
        time.sleep(1)

    monkeypatch.setattr(check, "PATIENCE_S", 0.2)
    rows = list(check.run([breaks, hangs, host.imports], Case({})))
    assert [(row.check, row.status) for row in rows] == [("breaks", FAILED), ("hangs", FAILED), ("imports", OK)]
    assert "KeyError" in rows[0].found and "no answer" in rows[1].found


def test_secrets_are_not_shown():
    shown = report.shown_environment({"HF_TOKEN": "hf_abc", "NCCL_AUTH_KEY": "abc", "NCCL_DEBUG": "INFO",
                                       "AWS_X": "abc", "OMPI_MCA_x": "tcp://me:abc@host", "RANK": "0"})
    assert shown["NCCL_DEBUG"] == "INFO" and shown["RANK"] == "0" and set(shown) == {
        "HF_TOKEN", "NCCL_AUTH_KEY", "NCCL_DEBUG", "OMPI_MCA_x", "RANK"}
    assert "abc" not in json.dumps(shown)


def as_rank(monkeypatch, local_rank: int, trial: Trial, found: list[Finding]) -> tuple[int, list[float]]:
    """(the exit code of the doctor as rank 7 of 8, how long it let rank 0 report)."""
    waited: list[float] = []
    for name, value in {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": str(local_rank)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(main.time, "sleep", waited.append)
    monkeypatch.setattr(main.signal, "signal", lambda *_: None)
    monkeypatch.setattr(main.job, "try_job", lambda ranks, limit_s: trial)
    monkeypatch.setattr(main, "_look", lambda args, launched: (Case({}), list(found)))
    args = argparse.Namespace(config=None, overrides=[], ranks=0, limit=100.0, json=False)
    return main.main(args, results=None), waited


def test_a_rank_of_another_host_tells_what_was_found_there(monkeypatch, capsys):
    joined = Trial(0, "", ranks=({"host": "another", "summing": "", "wrong_sums": []},))
    found = [Finding(FAILED, "64 MB", "more", "shm of a container"), Finding(WARNING, "many", "fewer", "segments")]
    assert as_rank(monkeypatch, 0, joined, found) == (CHECK_FAILED, [GRACE_S])
    me = f"rank 7 on {socket.gethostname()}: "
    assert capsys.readouterr().err.splitlines()[:2] == [
        f"{me}shm of a container: 64 MB; do: more", f"{me}segments: many; do: fewer"]
    assert as_rank(monkeypatch, 3, joined, found) == (DONE, []), "another rank of its host looks at it"
    assert not capsys.readouterr().err


def test_a_rank_that_did_not_join_says_so_and_lets_rank_0_report(monkeypatch, capsys):
    code, waited = as_rank(monkeypatch, 3, Trial(None, "no end after 8 s", {7: "join"}), [])
    assert code == CHECK_FAILED and 100 < waited[0] <= 100 + GRACE_S
    assert "rendezvous: no end after 8 s; rank 7 was joining" in capsys.readouterr().err


def test_the_limit_of_a_container(monkeypatch, tmp_path):
    """cgroup v2: what is left of the limit around this process's group, files in the page cache not counted."""
    monkeypatch.setattr(cpu, "CGROUPS", tmp_path)
    monkeypatch.setattr(cpu, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "own").write_text("0::/job/step\n")
    free = host.available_memory()
    assert free > 2_000_000
    for name, text in {"memory.max": "2000000", "memory.current": "1500000",
                       "memory.stat": "inactive_file 500000\n"}.items():
        (tmp_path / "job" / name).write_text(text)
    assert host.available_memory() == 1_000_000


def doctor(*args: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "launch" / "doctor.py"), *args], capture_output=True, text=True,
                          timeout=100, env={**os.environ, **environ})


def test_the_report(tmp_path, monkeypatch):
    """With torch broken, which is when people run it: it says so, gives the facts it has, and exits 1."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = doctor("--ranks", "2", HF_TOKEN="hf_abc")
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    assert "**failed**: imports: import torch: ImportError: libcudart.so.13" in run.stdout
    assert "rendezvous: not tried: a job cannot run so, see imports" in run.stdout
    assert f"python: {sys.version.split()[0]}" in run.stdout and "hf_abc" not in run.stdout
    whole = json.loads(doctor("--json").stdout)
    assert whole.keys() == {"facts", "checks", "ranks"}
    assert whole["checks"][0].keys() == {"check", "status", "found", "do"}
    assert whole["facts"]["packages"]["torch"]


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="no virtual environment: the packages are in the interpreter")
def test_the_doctor_needs_no_package():
    """The interpreter that the virtual environment was made from, without anything installed."""
    run = subprocess.run([sys._base_executable, str(ROOT / "launch" / "doctor.py"), "--config",
                          str(ROOT / "configs" / "demo_tp4.yaml")], capture_output=True, text=True, timeout=60,
                         env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, cwd="/")
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    assert "import torch: ModuleNotFoundError" in run.stdout and "**failed**: config: " in run.stdout


@pytest.mark.parametrize("args, words", [
    (["--config", "no-such.yaml"], "no-such.yaml"), (["model.dtype=float32"], "--config"),
    (["--ranks", "0"], "--ranks"),
])
def test_bad_input(args, words):
    run = doctor(*args)
    assert run.returncode == 2 and words in run.stderr and not run.stdout and "Traceback" not in run.stderr
