"""A real job of ranks that try to work together (trial.py), and the checks of what they reported."""

from __future__ import annotations

import os
import socket
import sys

from adapter.commands import subprocesses
from adapter.doctor.check import FAILED, OK, WARNING, Case, Finding, Trial
from adapter.doctor.trial import STEPS
from adapter.parallel import network
from adapter.parallel.cpu import cpu_quota, usable_cores, within_quota
from adapter.parallel.launchers import launcher_of

WITHOUT_OP = ("CXX=none and TORCH_EXTENSIONS_DIR=<an empty directory> in the environment of the ranks sum over torch's "
              "group instead; report it with all of this")


def try_job(ranks: int, limit_s: float) -> Trial:
    """Take part in the job of which this process is a rank, or start one of `ranks` ranks on this host and end it."""
    if launcher_of().mark:
        port, argv = os.environ.get("MASTER_PORT", "none"), [sys.executable, "-m", "adapter.doctor.trial"]
    else:
        print(f"starting {ranks} ranks ...", file=sys.stderr, flush=True)
        port = str(network.free_port())
        argv = [*subprocesses.launcher(ranks, port), "--module", "adapter.doctor.trial"]
    ended = subprocesses.run(argv, limit_s, {"PYTHONSAFEPATH": "1"}, port=port)
    if ended.code != 0:
        print("\n".join(ended.err[-40:]), file=sys.stderr, flush=True)
    steps = {row["rank"]: row["step"] for row in ended.objects if row["step"] in STEPS}
    errors = {row["rank"]: row["error"] for row in ended.objects if row["step"] == "failed"}
    done = [row["ranks"] for row in ended.objects if row["step"] == "done"]
    return Trial(ended.code, ended.how, steps, errors, tuple(done[0]) if done else ())


def rendezvous(case: Case) -> Finding | None:
    """Did the ranks of a real job find each other?"""
    trial = case.trial
    if trial is None:
        return None
    if not trial.ranks or trial.code != 0:
        return Finding(FAILED, _failure(trial), _remedy(case, trial))
    hosts = ", ".join(sorted({row["host"] for row in trial.ranks}))
    return Finding(OK, f"{len(trial.ranks)} rank{'s' * (len(trial.ranks) > 1)} on {hosts} joined")


def _failure(trial: Trial) -> str:
    """In words, the errors that ranks reported, or how far each had come."""
    if trial.errors:
        return "; ".join(f"rank {rank}: {error}" for rank, error in sorted(trial.errors.items()))
    reached = "; ".join(f"rank {rank} was {STEPS[step]}" for rank, step in sorted(trial.steps.items()))
    return f"{trial.how}; {reached or 'no rank reported anything'}"


def _remedy(case: Case, trial: Trial) -> str:
    """What to do about ranks that did not join, by their errors or by the furthest step that one reached."""
    errors = list(trial.errors.values())
    if any("Unable to find address" in error for error in errors):  # gloo's words
        return f"GLOO_SOCKET_IFNAME must name one of {', '.join(case.facts('psutil').get('interfaces', {}))}"
    if any(error.startswith("UserError") for error in errors):
        return "as the message says"
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
        return Finding(FAILED, f"{summing}: wrong sums ({', '.join(wrong)})", WITHOUT_OP)
    return Finding(OK, f"{summing}; right in float32 and bfloat16")


def threads(case: Case) -> Finding | None:
    """Has each thread of this host's ranks a core? torch takes one for each core unless told otherwise, and launchers
    may bind all ranks to the same few. Ranks that have not been started are judged by this process's environment."""
    if not case.on_cpu:
        return None
    stated, cores = case.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip(), usable_cores()
    ranks, count = case.ranks, case.ranks * ((stated.isdecimal() and int(stated)) or cores)
    here = [row for row in (case.trial.ranks if case.trial else ()) if row["host"] == socket.gethostname()]
    if here:
        cores = within_quota(len(set().union(*(row["cores"] for row in here))), cpu_quota())
        ranks, count = len(here), sum(row["threads"] for row in here)
    found = f"{ranks} rank{'s' * (ranks > 1)} on this host, up to {count} threads on {cores} usable cores"
    if count <= cores:
        return Finding(OK, found)
    do = f"export OMP_NUM_THREADS={max(1, cores // ranks)}"
    if ranks <= cores:
        return Finding(WARNING, f"{found}, which take turns: slow", do)
    return Finding(WARNING, f"{found}: right, but slow, and without DeepSpeed's shared-memory op, which busy-waits",
                   "fewer ranks, or more cores for the job: mpirun --bind-to none, srun --cpus-per-task, deepspeed "
                   f"--bind_cores_to_rank, a container's CPU quota; {do}")


JOB = (rendezvous, all_reduce, threads)
