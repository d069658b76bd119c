"""Checks of this machine and of what is installed on it."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from adapter.commands.subprocesses import ROOT, mapped, segments
from adapter.doctor import machine
from adapter.doctor.check import Case, Finding, failed, ok, warning

SEGMENT_BYTES = 69_300_000  # of /dev/shm, that DeepSpeed's shared-memory op takes for each rank
NCCL_BYTES = 512 << 20  # of /dev/shm, below which ds_report warns where NCCL is used
BUILD_S = 300  # no build takes longer, so that an older lock file was left by a killed process
STARTING_S = 60  # a younger segment may be about to be mapped
NEEDED = ("torch", "torchvision", "deepspeed", "transformers", "safetensors", "numpy", "pydantic", "yaml", "PIL", "av",
          "psutil", "packaging", "jinja2")  # by the names they are imported under
REMEDY = {
    "torch": "pip install --force-reinstall torch==<the same release>; a file or directory of your own named torch "
             "hides it too",
    "torchvision": "torch and torchvision must be a pair, from the same index: pip install --force-reinstall "
                   "torchvision==<the one for your torch> (pytorch.org/get-started/previous-versions lists the pairs)",
    "deepspeed": "pip install 'deepspeed>=0.16'; where the message names an accelerator, DS_ACCELERATOR=cpu or cuda "
                 "says which",
    "transformers": "pip install 'transformers>=4.49,<6'",
    "yaml": "pip install --force-reinstall pyyaml",
    "PIL": "pip install --force-reinstall pillow",
}


def packages(case: Case) -> Finding:
    """Are the releases in the ranges that pyproject.toml states?"""
    from packaging.requirements import Requirement

    stated = requirements()
    if stated is None:
        return ok("ranges not checked: qwenvl-tp is not installed, and this Python cannot read pyproject.toml")
    needed = [r for r in map(Requirement, stated) if r.marker is None or r.marker.evaluate({"extra": ""})]
    have = {r.name: machine.installed(r.name) for r in needed}
    wrong = [r for r in needed if not have[r.name] or not r.specifier.contains(str(have[r.name]), prereleases=True)]
    if wrong:
        return failed("; ".join(f"{r} is needed, {have[r.name] or 'none'} is installed" for r in wrong),
                      "pip install " + " ".join(shlex.quote(str(r)) for r in wrong))
    return ok(f"{len(needed)} packages in the ranges of pyproject.toml")


def requirements() -> list[str] | None:
    """Of the checkout this runs from, else of the installed distribution; None where neither can be read."""
    if (ROOT / "pyproject.toml").exists() and sys.version_info >= (3, 11):
        import tomllib

        stated: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        return stated
    try:
        return metadata.requires("qwenvl-tp")
    except metadata.PackageNotFoundError:
        return None


def imports(case: Case) -> Finding:
    """Does every package that is needed import?"""
    broken = {name: found["error"] for name, found in case.packages.items() if name in NEEDED and "error" in found}
    if broken:
        return failed("; ".join(f"import {name}: {error}" for name, error in broken.items()), "; ".join(dict.fromkeys(
            REMEDY.get(name, f"pip install --force-reinstall {name}") for name in broken)))
    return ok(f"{', '.join(name for name in case.packages if name in NEEDED)} import")


def gpu(case: Case, devices: Path = Path("/dev")) -> Finding | None:
    """Can torch use the GPUs of this machine, and are they enough for the ranks?"""
    torch, cards = case.facts("torch"), list(devices.glob("nvidia[0-9]*"))
    if not torch or case.environ.get("DS_ACCELERATOR") == "cpu" or not (cards or torch.get("cards")):
        return None
    chosen = case.environ.get("CUDA_VISIBLE_DEVICES", "(not set)")
    if not torch.get("cuda") and not torch.get("hip"):
        return warning(f"{len(cards)} NVIDIA devices here, and torch {torch['version']} is a build without CUDA",
                       "install a CUDA build of torch, or DS_ACCELERATOR=cpu to say that this is meant")
    if not torch.get("cuda_available"):
        driver = torch.get("environment", {}).get("nvidia_driver_version") or "unknown"
        return failed(f"{len(cards)} NVIDIA devices here, and torch (CUDA {torch['cuda']}) can use none: driver "
                      f"{driver}, CUDA_VISIBLE_DEVICES={chosen}",
                      "a driver for that CUDA or a torch for an older one; in a container --gpus all")
    visible = len(torch["cards"])
    if visible < case.ranks:
        return failed(f"{case.ranks} ranks on this host, {visible} GPUs visible (CUDA_VISIBLE_DEVICES={chosen})",
                      f"start {visible} ranks here, or make more visible")
    if not torch["peers"]:
        return warning(f"{visible} GPUs, not all of which reach each other's memory: collectives go through the host",
                       "slower, not wrong; where they hang, NCCL_P2P_DISABLE=1")
    return ok(f"{visible} x {torch['cards'][0]['name']}, NCCL {torch['nccl']}")


def compiler(case: Case) -> Finding | None:
    """DeepSpeed's shared-memory op is compiled at first use: ninja, a C++ compiler, Python's headers."""
    if not case.on_cpu:
        return None
    wanted = case.environ.get("CXX", "c++")
    ninja, cxx = (shutil.which(name, path=case.environ.get("PATH")) for name in ("ninja", wanted))
    if not ninja or not cxx:
        beside = Path(sys.executable).parent / "ninja"
        have_ninja = f"export PATH={shlex.quote(str(beside.parent))}:$PATH" if beside.exists() else "pip install ninja"
        remedies = ([] if ninja else [have_ninja]) + ([] if cxx else ["apt install g++, or CXX=<a C++ compiler>"])
        return warning(f"{' and '.join(w for w, has in (('ninja', ninja), (wanted, cxx)) if not has)} not on PATH: "
                       "sums go over torch's group, which is slower, where no shared-memory op was compiled before",
                       "; ".join(remedies))
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return failed(f"no Python.h in {sysconfig.get_path('include')}: the shared-memory op does not compile",
                      "apt install python3-dev (of this Python), or CXX=none to do without the op")
    return ok(f"{ninja}, {cxx}, Python.h")


def extensions(environ: Mapping[str, str]) -> Path:
    """Where torch keeps what it compiles."""
    cache = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or Path.home(), ".cache")
    return Path(environ.get("TORCH_EXTENSIONS_DIR") or Path(cache, "torch_extensions"))


def extensions_cache(case: Case) -> Finding:
    """Can compiled operators be written to torch's cache and loaded from it, and has a killed build locked it?"""
    root = extensions(case.environ)
    above = next(path for path in (root, *root.absolute().parents) if path.exists())
    elsewhere = "TORCH_EXTENSIONS_DIR=<a directory that can be written and is not mounted noexec>"
    try:
        with tempfile.TemporaryFile(dir=above) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return failed(f"{root}: {above} cannot be written ({error.strerror}): nothing can be compiled there", elsewhere)
    if os.statvfs(above).f_flag & os.ST_NOEXEC:
        return failed(f"{root} is mounted noexec: what is compiled there cannot be loaded", elsewhere)
    locks = sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}) if waits_for_lock_files() else []
    old = [str(lock) for lock in locks if time.time() - lock.stat().st_mtime > BUILD_S]
    if old:
        return failed(f"{', '.join(old)}: older than any build takes, left by a killed process; every start waits for "
                      "it to go away",
                      f"if no other host or container is compiling: rm {' '.join(map(shlex.quote, old))}")
    return ok(str(root))


def waits_for_lock_files() -> bool:
    """Does this torch wait for a lock file to go away? Later releases lock through the kernel, which frees the lock of
    a killed process. Read from its source, not imported: torch may be broken."""
    spec = importlib.util.find_spec("torch")
    source = Path(spec.origin).parent / "utils" / "cpp_extension.py" if spec and spec.origin else None
    return source is None or not source.exists() or "FileBaton(" in source.read_text(errors="replace")


def dev_shm(case: Case) -> Finding:
    """Is there room in /dev/shm, and did killed jobs leave something there? A write past its end is a SIGBUS."""
    size, free = machine.shm_bytes()
    need = case.ranks * SEGMENT_BYTES if case.on_cpu else NCCL_BYTES * (case.ranks > 1)
    found = f"{free / 1e6:.0f} MB of {size / 1e6:.0f} MB free, {need / 1e6:.0f} MB needed"
    if free < need:
        dies = "ranks die of SIGBUS" if case.on_cpu else "NCCL may fail (unhandled system error)"
        row = failed if case.on_cpu else warning
        return row(f"{found}: {dies}", "docker run --shm-size=2g (or --ipc=host); in Kubernetes an emptyDir of medium "
                   "Memory at /dev/shm; else mount -o remount,size=2G /dev/shm")
    left = segments_of_ended_jobs()
    if left:
        return warning(f"{len(left)} segments that no process of this host has mapped, e.g. {left[0]}: each holds 69 "
                       "MB, and a job on the same port would take them for its own",
                       f"if no other container shares /dev/shm: rm {' '.join(map(shlex.quote, left))}")
    return ok(found)


def segments_of_ended_jobs() -> list[str]:
    """DeepSpeed's names in /dev/shm, older than a start takes, that no process has mapped. Other users' are left out,
    unless root looks: who has those mapped cannot be seen."""
    files = {file for file in segments(r"\d+") if file.name.startswith("deepspeed_") and file.exists()}
    mine = {file for file in files if os.geteuid() in (0, file.stat().st_uid)}
    old = {file for file in mine if time.time() - file.stat().st_mtime > STARTING_S}
    return sorted(str(file) for file in old - mapped(old))


HOST = (packages, imports, gpu, compiler, extensions_cache, dev_shm)
