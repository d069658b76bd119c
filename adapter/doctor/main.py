"""What an issue report needs, each thing that breaks tensor-parallel jobs checked, and what to do about each failure.

    qwenvl-tp doctor [--config C [key=value ...]] [--ranks N] [--json]
    deepspeed --num_accelerators 4 launch/doctor.py      as ranks of any launcher: does such a job work?
    python launch/doctor.py ...                          from a checkout; or python -m adapter.doctor

--ranks N starts a job of N ranks on this host and ends it. stdout: the report, text that can be pasted into an issue,
or one JSON object. Exit 0: nothing failed (warnings may be there); 1: something did; 2: bad input. Works where torch,
DeepSpeed or any other package is broken or absent, ends after a bounded time, and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NoReturn

from adapter.commands import common, subprocesses
from adapter.doctor import check, host, job, report
from adapter.doctor.check import FAILED, WARNING, Case, Finding
from adapter.parallel.launchers import environment_rank, launcher_of
from policies.errors import UserError

LIMIT_S = 300.0  # for a job of ranks, which may have to compile the shared-memory ops first
HOPELESS = ("imports", "extensions cache", "dev shm")  # checks without which no job can start
LOCAL_SIZES = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")  # by launchers
IMPORT_S = 120.0  # for all packages together, from a slow disk


def main(args: argparse.Namespace, results: common.Results) -> int:
    launched, rank, local_rank = bool(launcher_of().mark), environment_rank("RANK"), environment_rank("LOCAL_RANK")
    if launched and args.ranks:
        raise UserError("--ranks starts a job of its own; under a launcher, whose ranks are here already, leave it out")
    if args.overrides and not args.config:
        raise UserError(f"{args.overrides[0]!r} changes a config, and there is no --config")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended on the way out
    began, case, findings = time.monotonic(), Case(os.environ), list[Finding]()
    if local_rank == 0:  # one of each host looks at it
        case, findings = _look(args, launched)
    if launched or args.ranks:
        if hopeless := [f.check for f in findings if f.status == FAILED and f.check in HOPELESS]:
            findings.append(Finding(WARNING, f"not tried: a job cannot run so, see {' and '.join(hopeless)}",
                                    "do what those rows say first", "rendezvous"))
        else:
            case = replace(case, trial=job.try_job(args.ranks, args.limit))
    findings += check.run(job.JOB, case)
    code = common.CHECK_FAILED if any(f.status == FAILED for f in findings) else common.DONE
    if rank:
        joined = case.trial and case.trial.code == 0
        _tell(rank, local_rank, findings)
        if code != common.DONE:  # launchers end a job with the first rank that fails: let rank 0 report before
            time.sleep(common.GRACE_S + (0 if joined else max(0, args.limit - (time.monotonic() - began))))
        return code
    facts, rows, ranks = report.facts(case), [asdict(f) for f in findings], case.trial.ranks if case.trial else ()
    results.text(json.dumps({"facts": facts, "checks": rows, "ranks": ranks}, ensure_ascii=False) if args.json
                 else report.text(facts, findings))
    return code


def _look(args: argparse.Namespace, launched: bool) -> tuple[Case, list[Finding]]:
    """What the checks of this host look at, and what they found. Raises UserError."""
    config, findings = None, list[Finding]()
    if args.config:
        try:
            from adapter.config.load import load_config

            config = load_config(args.config, args.overrides, download=False)
        except ImportError as error:
            findings.append(Finding(FAILED, f"{args.config} cannot be read: {error}", "see the row imports", "config"))
    here = next((int(os.environ[name]) for name in LOCAL_SIZES if os.environ.get(name)), 1)
    ranks = here if launched else args.ranks or (config.tensor_parallel.tp_size if config else 1)
    print("importing the packages ...", file=sys.stderr, flush=True)
    case = Case(os.environ, ranks, probe(host.NEEDED), config)
    return case, [*findings, *check.run(host.HOST, case)]


def probe(names: Sequence[str], limit_s: float = IMPORT_S) -> dict[str, Any]:
    """Package -> {"facts": ...} or {"error": ...}, by probe.py. One that crashes or hangs has an error too."""
    found: dict[str, Any] = {}
    until = time.monotonic() + limit_s
    while left := [name for name in names if name not in found]:
        ended = subprocesses.run([sys.executable, "-m", "adapter.doctor.probe", *left],
                                 max(1.0, until - time.monotonic()), {"PYTHONSAFEPATH": "1"})
        found |= {row["package"]: row for row in ended.objects}
        found |= {name: {"error": ended.how} for name in [name for name in left if name not in found][:1]}
    return found


def _tell(rank: int, local_rank: int, findings: list[Finding]) -> None:
    """A rank other than 0 says on stderr what is wrong with its part; one of each host says also what may be."""
    for f in findings:
        if f.status == FAILED or (f.status == WARNING and local_rank == 0):
            print(f"rank {rank} on {socket.gethostname()}: {f.check}: {f.found}; do: {f.do}", file=sys.stderr,
                  flush=True)


def start() -> NoReturn:
    arguments = common.parser(__doc__, config_required=False)
    arguments.add_argument("--ranks", type=common.whole_number(1, 1024), default=0, metavar="N",
                           help="start a job of N ranks on this host")
    arguments.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="that the job of ranks may "
                           f"take, default {LIMIT_S:.0f}: the shared-memory ops may have to be compiled")
    arguments.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the text")
    common.run(main, arguments)


if __name__ == "__main__":
    start()
