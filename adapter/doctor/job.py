"""A real job of ranks that try to work together (trial.py), and the checks of what they reported."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from adapter.commands import subprocesses
from adapter.doctor.check import OK, Case, Finding, Trial, failed, ok, warning
from adapter.doctor.trial import STEPS
from adapter.parallel import network
from adapter.parallel.launchers import Launch

WITHOUT_OP = ("CXX=none and TORCH_EXTENSIONS_DIR=<an empty directory> in the environment of the ranks sum over torch's "
              "group instead; report it with all of this")


def try_job(place: Launch | None, ranks: int, limit_s: float, findings: list[Finding]) -> Trial:
    """Take part in the job of which this process is a rank, or start one of `ranks` ranks on this host and end it.

    findings: of this host, for rank 0 to report.
    """
    argv = [sys.executable, "-m", "adapter.doctor.trial"]
    stdin, port = "", os.environ.get("MASTER_PORT", "none")
    if place is None:
        print(f"starting {ranks} ranks ...", file=sys.stderr, flush=True)
        port = str(network.free_port())
        argv[1:] = ["-m", "deepspeed.launcher.runner", "--hostfile", os.devnull, "--num_accelerators", str(ranks),
                    "--master_addr", "127.0.0.1", "--master_port", port, "--module", "adapter.doctor.trial"]
    else:
        stdin = json.dumps([asdict(finding) for finding in findings if finding.status != OK])
    ended = subprocesses.run(argv, limit_s, {"PYTHONSAFEPATH": "1"}, stdin, port=port)
    if ended.code != 0:
        print("\n".join(ended.err[-40:]), file=sys.stderr, flush=True)
    steps = {row["rank"]: row["step"] for row in ended.objects if row["step"] in STEPS}
    errors = {row["rank"]: row["error"] for row in ended.objects if row["step"] == "failed"}
    done = [row["ranks"] for row in ended.objects if row["step"] == "done"]
    return Trial("", ended.code, ended.how, steps, errors, tuple(done[0]) if done else ())


def rendezvous(case: Case) -> Finding | None:
    """Did the ranks of a real job find each other?"""
    trial = case.trial
    if trial is None:
        return None
    if trial.not_tried:
        return warning(f"not tried: {trial.not_tried}", "do what those rows say first")
    if trial.ranks and trial.code == 0:
        hosts = sorted({row["host"] for row in trial.ranks})
        return ok(f"{len(trial.ranks)} rank{'s' * (len(trial.ranks) > 1)} on {', '.join(hosts)} joined")
    return failed(failure(trial), _remedy(trial))


def failure(trial: Trial) -> str:
    """In words, the errors that ranks reported, or how far each had come."""
    if trial.errors:
        return "; ".join(f"rank {rank}: {error}" for rank, error in sorted(trial.errors.items()))
    reached = "; ".join(f"rank {rank} was {STEPS[step]}" for rank, step in sorted(trial.steps.items()))
    return f"{trial.how}; {reached or 'no rank reported anything'}"


def _remedy(trial: Trial) -> str:
    if any("port" in error for error in trial.errors.values()):
        return "deepspeed --master_port <a free one>"
    if any("mpi4py sees" in error for error in trial.errors.values()):
        return "mpi4py must be of the MPI whose mpirun starts the job: compare `mpirun --version` with the row mpi"
    if "sum" in trial.steps.values():
        return WITHOUT_OP
    if "join" in trial.steps.values():
        return ("a firewall between the ranks, or the wrong interface (MASTER_ADDR, GLOO_SOCKET_IFNAME); a first start "
                "that compiles on a slow machine: --limit; a rank that died: see above")
    return "see what the ranks wrote above; --limit gives a slow machine longer"


def all_reduce(case: Case) -> Finding | None:
    """Which all-reduce the ranks use, why, and whether its sums are right."""
    if case.trial is None or not case.trial.ranks:
        return None
    summing = case.trial.ranks[0]["summing"]
    wrong = [f"rank {row['rank']}: {size}" for row in case.trial.ranks for size in row["wrong_sums"]]
    if wrong:
        return failed(f"{summing}: wrong sums ({', '.join(wrong)})", WITHOUT_OP)
    return ok(f"{summing}; right in float32 and bfloat16")


def same_releases(case: Case) -> Finding | None:
    """Ranks with different packages compute different numbers, or wait for each other for ever."""
    if case.trial is None or len(case.trial.ranks) < 2:
        return None
    seen = {name: sorted({row["versions"][name] or "none" for row in case.trial.ranks})
            for name in case.trial.ranks[0]["versions"]}
    differ = [f"{name} {' and '.join(versions)}" for name, versions in seen.items() if len(versions) > 1]
    return failed("; ".join(differ), "install the same on every host") if differ else ok("the same on every rank")


def binding(case: Case) -> Finding | None:
    """A launcher that binds all ranks of a host to the same few cores makes them take turns."""
    if case.trial is None or len(case.trial.ranks) < 2 or not case.on_cpu:
        return None
    rows, tight = case.trial.ranks, []
    found = "; ".join(f"rank {row['rank']} on {row['host']}: {len(row['cores'])} cores ({row['cores'][0]}-"
                      f"{row['cores'][-1]}), {row['threads']} threads, {row['device']}" for row in rows)
    for host in sorted({row["host"] for row in rows}):
        here = [row["cores"] for row in rows if row["host"] == host]
        together = len(set().union(*here))
        if together < len(here):
            tight.append(f"{len(here)} ranks of {host} share {together} core{'s' * (together > 1)}")
    if tight:
        return warning(f"{'; '.join(tight)} ({found})", "fewer ranks, or more cores for the job: mpirun --bind-to "
                       "none, srun --cpus-per-task, deepspeed --bind_cores_to_rank")
    return ok(found)


JOB = (rendezvous, all_reduce, same_releases, binding)
