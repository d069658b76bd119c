"""Run the scripts of launch/launchers/ and look at what they answer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from hosts import Host
from launching import ROOT, Job, Outcome, Running, free_port

SCRIPTS = ROOT / "launch" / "launchers"
CONFIG = ROOT / "configs" / "demo_tp4.yaml"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # a python there is this one; MPI's tools lie beside it


def start(script: str, ranks: int, *, host: Host | None = None, config: Path = CONFIG, overrides: Sequence[str] = (),
          **env: str) -> Running:
    """A script as a user starts it, on this machine or on a host, with what is in the environment."""
    argv = ["bash", str(SCRIPTS / script), str(config), f"tensor_parallel.tp_size={ranks}", *overrides]
    env = {"PYTHON": sys.executable, "PATH": PATH, "RANKS": str(ranks), "MASTER_PORT": str(free_port()), **env}
    return host.start(argv, env) if host else Running(argv, env, port=int(env["MASTER_PORT"]))


def tokens(out: str) -> dict[str, list[int]]:
    """Tokens by request of a job that answered every request rightly."""
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    summaries = [row for row in rows if row.get("summary")]
    assert len(summaries) == 1 and summaries[0]["answered"] == 12 and summaries[0]["wrong"] == 0, out[-3000:]
    return {row["id"]: row["tokens"] for row in rows if "id" in row}


def finished(job: Running, timeout: float = 600) -> Outcome:
    """Of a job on this machine that must succeed and leave nothing."""
    outcome = job.finish(timeout)
    assert outcome.code == 0, outcome.err[-4000:]
    left = job.leftovers()
    assert not left, left
    return outcome


@cache
def one_host() -> dict[str, list[int]]:
    """The tokens of two forked ranks of one host: what those of every launcher must equal."""
    return tokens(finished(Job(2, ROOT / "launch" / "generate.py", "--config", str(CONFIG),
                               "tensor_parallel.tp_size=2")).out)
