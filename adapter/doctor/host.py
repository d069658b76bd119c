"""Checks of this machine, of what is installed on it, and of whether a job's config fits it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from adapter.commands.subprocesses import ROOT, SHM, mapped, segments
from adapter.doctor.check import FAILED, OK, WARNING, Case, Finding
from adapter.parallel.cpu import cgroups
from policies.errors import UserError

SEGMENT_BYTES = 69_300_000  # of /dev/shm, that DeepSpeed's shared-memory op takes for each rank
BUILD_S = 300  # no build takes longer, so that an older lock file was left by a killed process
STARTING_S = 60  # a younger segment may be about to be mapped
FIXED_BYTES = 700_000_000  # of a rank without weights: torch, DeepSpeed, Transformers
SPARE = 0.8  # share of the available memory beyond which a job may fit today and not tomorrow
IMAGE_PIXELS = 1_003_520  # of the largest image, where the config does not limit them
NEEDED = ("torch", "torchvision", "deepspeed", "transformers", "safetensors", "numpy", "pydantic", "yaml", "PIL", "av",
          "psutil", "packaging", "jinja2")  # by the names they are imported under
DISTRIBUTION = {"yaml": "pyyaml", "PIL": "pillow"}  # by the name that pip knows, where it is another
REMEDY = {
    "torch": "pip install --force-reinstall torch==<the same release>; a file or directory of your own named torch "
             "hides it too",
    "torchvision": "torch and torchvision must be a pair, from the same index: pip install --force-reinstall "
                   "torchvision==<the one for your torch> (pytorch.org/get-started/previous-versions lists the pairs)",
    "deepspeed": "pip install 'deepspeed>=0.16'; where the message names an accelerator, DS_ACCELERATOR=cpu or cuda "
                 "says which",
}


def packages(case: Case) -> Finding:
    """Are the releases in the ranges that pyproject.toml states?"""
    from packaging.requirements import Requirement

    stated = requirements()
    if stated is None:
        return Finding(OK, "not compared: qwenvl-tp is not installed, and this Python cannot read pyproject.toml")
    needed = [r for r in map(Requirement, stated) if r.marker is None or r.marker.evaluate({"extra": ""})]
    have = {r.name: installed(r.name) for r in needed}
    wrong = [r for r in needed if not have[r.name] or not r.specifier.contains(str(have[r.name]), prereleases=True)]
    if wrong:
        return Finding(FAILED, "; ".join(f"{r} is needed, {have[r.name] or 'none'} is installed" for r in wrong),
                       "pip install " + " ".join(shlex.quote(str(r)) for r in wrong))
    return Finding(OK, f"{len(needed)} packages in the ranges of pyproject.toml")


def requirements() -> list[str] | None:
    """Of the checkout this runs from, else of the installed distribution; None where neither can be read."""
    if (ROOT / "pyproject.toml").exists() and sys.version_info >= (3, 11):
        import tomllib

        stated: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        return stated
    return metadata.requires("qwenvl-tp") if installed("qwenvl-tp") else None


def installed(package: str) -> str | None:
    """Release of a package by its metadata, which does not import it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def imports(case: Case) -> Finding:
    """Does every package that is needed import?"""
    broken = {name: found["error"] for name, found in case.packages.items() if "error" in found}
    if not broken:
        return Finding(OK, f"{', '.join(case.packages)} import")
    remedies = [REMEDY.get(name, f"pip install --force-reinstall {DISTRIBUTION.get(name, name)}") for name in broken]
    return Finding(FAILED, "; ".join(f"import {name}: {error}" for name, error in broken.items()), "; ".join(remedies))


def gpu(case: Case, devices: Path = Path("/dev")) -> Finding | None:
    """Does torch use the NVIDIA devices of this machine? DeepSpeed computes on the CPU where it does not."""
    torch, cards = case.facts("torch"), len(list(devices.glob("nvidia[0-9]*")))
    if not torch or not cards or case.environ.get("DS_ACCELERATOR") == "cpu":
        return None
    cuda, here = torch.get("cuda_compiled_version"), f"{cards} NVIDIA devices here, and torch {torch['torch_version']}"
    if torch.get("is_cuda_available") == "True":
        return Finding(OK, f"{here} can use them")
    if not cuda:
        return Finding(WARNING, f"{here} is a build without CUDA",
                       "install a CUDA build of torch, or DS_ACCELERATOR=cpu to say that this is meant")
    driver = torch.get("nvidia_driver_version", "unknown")
    return Finding(FAILED, f"{here} (CUDA {cuda}) can use none: driver {driver}, "
                   f"CUDA_VISIBLE_DEVICES={case.environ.get('CUDA_VISIBLE_DEVICES', '(not set)')}",
                   "a driver for that CUDA or a torch for an older one; in a container --gpus all")


def compiler(case: Case) -> Finding | None:
    """The shared-memory ops and the kernels are compiled at first use: ninja, a C++ compiler, Python's headers."""
    building = case.facts("deepspeed")
    if not building or not case.on_cpu:
        return None
    if missing := building["missing_tools"]:
        remedies = [f"pip install ninja, and export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
                    if tool == "ninja" else "apt install g++, or CXX=<a C++ compiler>" for tool in missing]
        return Finding(WARNING, f"{' and '.join(missing)} not on PATH: sums go over torch's group and products through "
                       "torch's kernels, which is slower, where nothing was compiled before", "; ".join(remedies))
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return Finding(FAILED, f"no Python.h in {sysconfig.get_path('include')}: the shared-memory op does not compile",
                       "apt install python3-dev (of this Python), or CXX=none to do without the op")
    return Finding(OK, "ninja, a C++ compiler, Python.h")


def extensions_cache(case: Case) -> Finding | None:
    """Can compiled operators be written to torch's cache and loaded from it, and has a killed build locked it?"""
    building = case.facts("deepspeed")
    if not building:
        return None
    root = Path(building["build_root"])
    above = next(path for path in (root, *root.absolute().parents) if path.exists())
    noexec = os.statvfs(above).f_flag & os.ST_NOEXEC
    if noexec or not os.access(above, os.W_OK | os.X_OK):
        why = "is mounted noexec: what is compiled there cannot be loaded" if noexec else "cannot be written to"
        return Finding(FAILED, f"{root}: {above} {why}",
                       "TORCH_EXTENSIONS_DIR=<a directory that can be written to and is not mounted noexec>")
    locks = sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}) if building["waits_for_lock_files"] else []
    old = [str(lock) for lock in locks if time.time() - lock.stat().st_mtime > BUILD_S]
    if old:
        return Finding(FAILED, f"{', '.join(old)}: older than any build takes, left by a killed process; every start "
                       "waits for it to go away",
                       f"if no other host or container is compiling: rm {' '.join(map(shlex.quote, old))}")
    return Finding(OK, str(root))


def dev_shm(case: Case) -> Finding:
    """Is there room in /dev/shm, and did killed jobs leave something there? A write past its end is a SIGBUS."""
    size, _, free = shutil.disk_usage(SHM)
    need = case.ranks * SEGMENT_BYTES if case.on_cpu else 0  # NCCL says itself where it finds too little
    found = f"{free / 1e6:.0f} MB of {size / 1e6:.0f} MB free, {need / 1e6:.0f} MB needed"
    if free < need:
        return Finding(FAILED, f"{found}: ranks die of SIGBUS",
                       "docker run --shm-size=2g (or --ipc=host); in Kubernetes an emptyDir of medium Memory at "
                       "/dev/shm; else mount -o remount,size=2G /dev/shm")
    if left := segments_of_ended_jobs():
        return Finding(WARNING, f"{len(left)} segments that no process of this host has mapped, e.g. {left[0]}: each "
                       "holds 69 MB, and a job on the same port would take them for its own",
                       f"if no other container shares /dev/shm: rm {' '.join(map(shlex.quote, left))}")
    return Finding(OK, found)


def segments_of_ended_jobs() -> list[str]:
    """DeepSpeed's names in /dev/shm, older than a start takes, that no process has mapped. Other users' are left out,
    unless root looks: who has those mapped cannot be seen."""
    files = {file for file in segments(r"\d+") if file.name.startswith("deepspeed_") and file.exists()}
    mine = {file for file in files if os.geteuid() in (0, file.stat().st_uid)}
    old = {file for file in mine if time.time() - file.stat().st_mtime > STARTING_S}
    return sorted(str(file) for file in old - mapped(old))


def plan(case: Case) -> Finding | None:
    """Can the checkpoint of --config be cut so, are its files here, and does it fit the memory of this host?"""
    if case.config is None:
        return None
    from adapter.config.hub import described
    from adapter.planning.load import checked_plan, stated

    config = case.config
    try:
        with described(config.model.path, config.model.revision) as directory:
            plan, _ = checked_plan(directory, **stated(config))
    except UserError as error:
        return Finding(FAILED, str(error), "see each line; `python -m adapter plan --config C` has the whole plan")
    found = f"{config.model.path} over {plan.tp_size} ranks"
    if not case.on_cpu:
        return Finding(OK, found)  # a GPU that is full says so itself
    pixels, new = config.processor.max_pixels or IMAGE_PIXELS, config.generation.get("max_new_tokens", 256)
    side = plan.geometry.sizes["patch"] * plan.geometry.merge_side  # pixels of an image's token
    tokens = min(plan.geometry.context, pixels // side**2 + 256 + new)
    weights = max(plan.weight_bytes(r) for r in range(plan.tp_size))
    cache = max(plan.kv_bytes_per_token(r) for r in range(plan.tp_size)) * config.batch_size * tokens
    need, have = case.ranks * (weights + cache + FIXED_BYTES), available_memory()
    found += (f"; {case.ranks} ranks here, each {weights / 1e9:.2f} GB of weights, {cache / 1e9:.2f} GB of KV cache "
              f"({config.batch_size} requests x {tokens} tokens) and {FIXED_BYTES / 1e9:.1f} GB: {need / 1e9:.1f} GB "
              f"of {have / 1e9:.1f} GB available on this host")
    if need <= SPARE * have:
        return Finding(OK, found)
    return Finding(FAILED if need > have else WARNING, f"{found}: a rank killed for memory ends the job",
                   "end what else uses it; a larger tensor_parallel.tp_size over more hosts, model.dtype=bfloat16, a "
                   "smaller batch_size or max_pixels")


def available_memory() -> int:
    """Bytes that new processes can have: of the machine, or what the limits of this process's cgroup (v2) and of those
    around it leave, in which files in the page cache do not count as used."""
    stated = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(stated["MemAvailable"].split()[0]) * 1024
    for directory in cgroups():
        with suppress(OSError, ValueError):  # no such file, or "max"
            limit, used = (int((directory / name).read_text()) for name in ("memory.max", "memory.current"))
            parts = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
            available = min(available, max(0, limit - used + int(parts["inactive_file"])))
    return available


HOST = (packages, imports, gpu, compiler, extensions_cache, dev_shm, plan)
