"""What the doctor reads of the machine itself, with the standard library alone: packages may be broken."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from adapter.commands.subprocesses import ROOT, SHM
from adapter.parallel.cpu import cgroups
from adapter.parallel.launchers import Launch, environment_rank, launcher_of

LOCAL_SIZES = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
SHOWN = (  # beginnings of the names of environment variables that say how a job was started and what steers it
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "CROSS_", "MASTER_",
    "OMPI_COMM_", "OMPI_MCA_", "PMI_", "PMIX_RANK", "MPI_LOCAL", "SLURM_", "TORCHELASTIC_", "GLOO_", "NCCL_", "TORCH_",
    "PYTORCH_", "UCX_", "FI_", "CCL_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "DS_", "DEEPSPEED_", "CUDA_",
    "NVIDIA_", "ROCR_", "HIP_", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE", "LD_LIBRARY_PATH",
    "LD_PRELOAD", "PYTHONPATH", "CXX", "CC", "LANG", "LC_", "XDG_CACHE_HOME", "TMPDIR",
)
SECRET = re.compile(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL|AUTH|COOKIE|JWT|_URI|PROXY", re.IGNORECASE)
LONGEST = 200  # characters of a value that are shown


def shown_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables an issue report needs; of those that look like secrets only that they are set."""
    return {name: _shown(name, value) for name, value in sorted(environ.items()) if name.startswith(SHOWN)}


def _shown(name: str, value: str) -> str:
    if SECRET.search(name):
        return "(set, not shown)"
    value = re.sub(r"//[^/@\s]*@", "//(not shown)@", value)
    return value if len(value) <= LONGEST else f"{value[:LONGEST]}..."


def available_memory() -> int:
    """Bytes that new processes can have: of the machine, or what the limits of this process's cgroup (v2) and of those
    around it leave, in which files in the page cache do not count as used."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _read(Path("/proc/meminfo")), re.MULTILINE)
    available = int(found[1]) * 1024 if found else 0
    for directory in cgroups():
        limit, used = (_read(directory / name).strip() for name in ("memory.max", "memory.current"))
        if limit.isdigit() and used.isdigit():
            cached = re.search(r"^inactive_file (\d+)$", _read(directory / "memory.stat"), re.MULTILINE)
            available = min(available, max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0)))
    return available


def shm_bytes() -> tuple[int, int]:
    """(size, free) of /dev/shm; zeros where there is none."""
    if not SHM.exists():
        return 0, 0
    facts = os.statvfs(SHM)
    return facts.f_blocks * facts.f_frsize, facts.f_bavail * facts.f_frsize


def _read(file: Path) -> str:
    """The file's text, empty where it cannot be read."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def place(environ: Mapping[str, str]) -> Launch | None:
    """Where a launcher's environment puts this process, before MPI is asked; None where no launcher started it."""
    launcher = launcher_of(environ)
    if not launcher.mark:
        return None
    here = next((environ[name] for name in LOCAL_SIZES if environ.get(name)), "1")
    world = environ.get("WORLD_SIZE") or environ.get(launcher.world_size) or "1"
    return Launch(environment_rank("RANK", environ), int(world), environment_rank("LOCAL_RANK", environ), int(here))


def installed(package: str) -> str | None:
    """Release of a package by its metadata, which does not import it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def own_release() -> str:
    """Release of this project, and the commit of a checkout."""
    release = installed("qwenvl-tp") or "not installed"
    if not (ROOT / ".git").exists():
        return release
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    commit = ""
    with suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    return f"{release}, checkout {commit or 'unknown'}"
