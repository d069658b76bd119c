"""Checks of what the ranks of a real job told (trial.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapter.doctor.check import Case, Check, Row, failed, ok, warning
from adapter.doctor.trial import STEPS

WITHOUT_OP = ("CXX=none and TORCH_EXTENSIONS_DIR=<an empty directory> in the environment of the ranks sum over torch's "
              "group instead; report it with all of this")


def rendezvous(case: Case) -> Row | None:
    """Did the ranks of a real job find each other?"""
    if case.trial is None:
        return None
    if not_tried := case.trial.get("not_tried"):
        return warning(f"not tried: {not_tried}", "do what those rows say first")
    rows = case.trial["ranks"]
    if rows and case.trial["code"] == 0:
        hosts = sorted({row["host"] for row in rows})
        return ok(f"{len(rows)} rank{'s' * (len(rows) > 1)} on {', '.join(hosts)} joined in "
                  f"{case.trial['joined_s']:.1f} s")
    return failed(failure(case.trial), _way_on(case.trial))


def failure(trial: Mapping[str, Any]) -> str:
    """In words: what ranks said of it, or how far each had come."""
    if trial["errors"]:
        return "; ".join(f"rank {rank}: {error}" for rank, error in sorted(trial["errors"].items()))
    stood = "; ".join(f"rank {rank} was {STEPS[step]}" for rank, step in sorted(trial["steps"].items()))
    return f"{trial['how']}; {stood or 'no rank said anything'}"


def _way_on(trial: Mapping[str, Any]) -> str:
    steps = set(trial["steps"].values())
    if any("port" in error for error in trial["errors"].values()):
        return "deepspeed --master_port <a free one>"
    if any("mpi4py sees" in error for error in trial["errors"].values()):
        return "mpi4py must be of the MPI whose mpirun starts the job: compare `mpirun --version` with the row mpi"
    if "sum" in steps:
        return WITHOUT_OP
    if "join" in steps:
        return ("a firewall between the ranks, or the wrong interface (MASTER_ADDR, GLOO_SOCKET_IFNAME); a first start "
                "that compiles on a slow machine: --limit; a rank that died: see above")
    return "see what the ranks wrote above; --limit gives a slow machine longer"


def all_reduce(case: Case) -> Row | None:
    """Which way the ranks sum, why, and whether the sums are right."""
    if not (rows := _ranks(case)):
        return None
    wrong = {f"rank {row['rank']}: {size}" for row in rows for size in row["sums"]["wrong"]}
    first = rows[0]
    summing = first["summing"]  # every rank's choice, in rank 0's words
    if wrong:
        return failed(f"{summing}: wrong sums ({', '.join(sorted(wrong))})",
                      WITHOUT_OP)
    took = ", ".join(f"{int(size) / 1000:.0f} KB in {us} us" for size, us in first["sums"]["microseconds"].items())
    return ok(f"{summing}; right in float32 and bfloat16" + (f"; {took}" if took else ""))


def peers(case: Case) -> Row | None:
    """Ranks watch each other through /proc, to name the one that died or stalls."""
    rows = _ranks(case)
    said = dict.fromkeys(message for row in rows for message in row["warnings"])
    if said:
        return warning("; ".join(said), "ranks of one user in one container, /proc without hidepid for them; else jobs "
                       "run, and a rank that stalls is not named")
    return ok("the ranks of a host see each other") if len(rows) > 1 else None


def same_releases(case: Case) -> Row | None:
    """Ranks of different hosts with different packages compute different numbers, or wait for each other for ever."""
    if len(rows := _ranks(case)) < 2:
        return None
    seen = {name: sorted({row["versions"][name] or "none" for row in rows}) for name in rows[0]["versions"]}
    seen["python"] = sorted({row["python"] for row in rows})
    differ = [f"{name} {' and '.join(versions)}" for name, versions in seen.items() if len(versions) > 1]
    return failed("; ".join(differ), "install the same on every host") if differ else ok("the same on every rank")


def binding(case: Case) -> Row | None:
    """The cores of the ranks of a host: a launcher that binds them all to the same few makes them take turns."""
    if len(rows := _ranks(case)) < 2 or not case.on_cpu:
        return None
    said, tight = "; ".join(f"rank {row['rank']} on {row['host']}: cores {row['cores']}, {row['threads']} threads, "
                            f"{row['device']}" for row in rows), []
    for host in sorted({row["host"] for row in rows}):
        ranks = [row for row in rows if row["host"] == host]
        together = {core for row in ranks for core in row["core_list"]}
        if len(together) < len(ranks):
            tight.append(f"{len(ranks)} ranks of {host} share {len(together)} core{'s' * (len(together) > 1)}")
    if tight:
        return warning(f"{'; '.join(tight)} ({said})", "fewer ranks, or more cores for the job: mpirun --bind-to none, "
                       "srun --cpus-per-task, deepspeed --bind_cores_to_rank")
    return ok(said)


def _ranks(case: Case) -> list[Mapping[str, Any]]:
    return list((case.trial or {}).get("ranks") or ())


JOB: tuple[Check, ...] = (rendezvous, all_reduce, peers, same_releases, binding)
