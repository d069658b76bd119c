"""Checks of this machine and of what is installed on it."""

from __future__ import annotations

import importlib.util
import os
import resource
import shlex
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from adapter.doctor import machine
from adapter.doctor.check import Case, Check, Row, failed, ok, warning
from adapter.doctor.child import ROOT

SEGMENT_BYTES = 69_300_000  # what DeepSpeed's shared-memory op takes of /dev/shm, each rank
YOUNG_S = 300  # no build takes longer; a younger lock without a holder on this host may be another host's
STARTING_S = 60  # a younger segment may be about to be mapped
FEW_FILES = 1024
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


def packages(case: Case) -> Row:
    """Releases in the ranges that pyproject.toml states."""
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


def imports(case: Case) -> Row:
    broken = {name: found["error"] for name, found in case.packages.items() if name in NEEDED and "error" in found}
    if broken:
        return failed("; ".join(f"import {name}: {error}" for name, error in broken.items()), "; ".join(dict.fromkeys(
            REMEDY.get(name, f"pip install --force-reinstall {name}") for name in broken)))
    return ok(f"{', '.join(name for name in case.packages if name in NEEDED)} import")


def gpu(case: Case, devices: Path = Path("/dev")) -> Row | None:
    torch, cards = case.facts("torch"), list(devices.glob("nvidia[0-9]*"))
    if not torch or case.environ.get("DS_ACCELERATOR") == "cpu" or not (cards or torch.get("cards")):
        return None
    chosen = case.environ.get("CUDA_VISIBLE_DEVICES", "(not set)")
    if not torch.get("cuda") and not torch.get("hip"):
        return warning(f"{len(cards)} NVIDIA devices here, and torch {torch['version']} is a build without CUDA",
                       "install a CUDA build of torch, or DS_ACCELERATOR=cpu to say that this is meant")
    if not torch.get("cuda_available"):
        driver = machine.nvidia_driver() or "unknown"
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


def compiler(case: Case) -> Row | None:
    """DeepSpeed's shared-memory op is compiled at first use: ninja, a C++ compiler, Python's headers."""
    if not case.on_cpu:
        return None
    ninja, cxx = (machine.which(name, case.environ) for name in ("ninja", case.environ.get("CXX", "c++")))
    if not ninja or not cxx:
        beside = Path(sys.executable).parent / "ninja"
        have_ninja = f"export PATH={shlex.quote(str(beside.parent))}:$PATH" if beside.exists() else "pip install ninja"
        wanted = case.environ.get("CXX", "c++")
        return warning(f"{' and '.join(w for w, has in (('ninja', ninja), (wanted, cxx)) if not has)} not on PATH: "
                       "sums go over torch's group, which is slower, where no shared-memory op was compiled before",
                       "; ".join(([] if ninja else [have_ninja]) + ([] if cxx else [
                           "apt install g++, or CXX=<a C++ compiler>"])))
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return failed(f"no Python.h in {sysconfig.get_path('include')}: the shared-memory op does not compile",
                      "apt install python3-dev (of this Python), or CXX=none to do without the op")
    return ok(f"{ninja}, {cxx}, Python.h")


def extensions(environ: Mapping[str, str]) -> Path:
    """Where torch keeps what it compiles."""
    cache = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or Path.home(), ".cache")
    return Path(environ.get("TORCH_EXTENSIONS_DIR") or Path(cache, "torch_extensions"))


def extensions_cache(case: Case) -> Row:
    """Can what is compiled be written there, and loaded from there?"""
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
    return ok(str(root))


def stale_lock(case: Case) -> Row:
    """A process that is killed while it compiles or loads the op leaves its lock file, for which later starts wait for
    ever under most releases of torch. Under newer ones the kernel frees it, unless its holder is stopped or hangs."""
    root, by_file, now = extensions(case.environ), waits_for_lock_files(), time.time()
    held, old, young = list[str](), list[str](), list[str]()
    said = dict[str, str]()
    for lock in sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}):
        holders = machine.openers(lock) if by_file else machine.lockers(lock)
        with suppress(OSError):  # released while we look
            age = now - lock.stat().st_mtime
            if holders:
                stuck = [f"process {pid} ({state}, {age / 60:.0f} minutes old)" for pid, state, age in
                         map(machine.process, holders) if state == "stopped" or age > YOUNG_S]
                held += [f"{lock} is held by {who}" for who in stuck]
            elif by_file and lock.exists():
                said[str(lock)] = f"{lock} is {age / 60:.1f} minutes old and no process of this host has it open"
                (old if age > YOUNG_S else young).append(str(lock))
    remove = "if no other host or container is compiling: rm " + " ".join(map(shlex.quote, old + young))
    if old or held:
        return failed("; ".join([*held, *(said[lock] for lock in old)]) + ": every start waits for that",
                      "; ".join([*(["end these processes (kill), or kill -CONT a stopped one"] if held else []),
                                 *([remove] if old else [])]))
    return warning("; ".join(said.values()), remove) if young else ok(f"none under {root}")


def waits_for_lock_files() -> bool:
    """Does this torch wait for a lock file to go away? Read, not imported: torch may be broken."""
    spec = importlib.util.find_spec("torch")
    source = Path(spec.origin).parent / "utils" / "cpp_extension.py" if spec and spec.origin else None
    return source is None or not source.exists() or "FileBaton(" in source.read_text(errors="replace")


def dev_shm(case: Case) -> Row | None:
    """Room for the segment of each rank. A write past the end of /dev/shm is a SIGBUS, not an error."""
    if not case.on_cpu:
        return None
    (size, free), need = machine.shm_bytes(), case.ranks * SEGMENT_BYTES
    said = f"{free / 1e6:.0f} MB of {size / 1e6:.0f} MB free, {case.ranks} x 69 MB needed"
    if free < need:
        return failed(f"{said}: ranks die of SIGBUS", "docker run --shm-size=2g (or --ipc=host); in Kubernetes an "
                      "emptyDir of medium Memory at /dev/shm; else mount -o remount,size=2G /dev/shm")
    return ok(said)


def stale_segments(case: Case) -> Row:
    """Names that killed jobs left: each holds 69 MB, and a job on the same port would take them for its own."""
    old = []
    for file in sorted(machine.SHM.glob("deepspeed_allreduce_buffer_*")):
        with suppress(OSError):
            facts = file.stat()
            mine = os.geteuid() in (0, facts.st_uid)  # of others' jobs it cannot be seen who has them mapped
            old += [file] if mine and time.time() - facts.st_mtime > STARTING_S else []
    used = machine.mapped(old)
    left = [str(file) for file in old if file not in used]
    if left:
        return warning(f"{len(left)} in /dev/shm that no process of this host has mapped, e.g. {left[0]}",
                       "if no other container shares /dev/shm: rm " + " ".join(map(shlex.quote, left)))
    return ok("none in /dev/shm")


def numactl(case: Case) -> Row | None:
    if machine.numa_nodes() == 1 or not case.on_cpu:
        return None
    if not machine.which("numactl", case.environ):
        return warning(f"{machine.numa_nodes()} NUMA nodes and no numactl: ranks are not bound to memory beside them",
                       "apt install numactl, then deepspeed --bind_cores_to_rank ...")
    return ok("there; deepspeed --bind_cores_to_rank uses it")


def encoding(case: Case) -> Row:
    name = sys.getfilesystemencoding()
    if name.lower().replace("-", "") != "utf8":
        return warning(f"file names are {name}: names and prompts that are not ASCII may not be found or shown",
                       "export LC_ALL=C.UTF-8")
    return ok("UTF-8")


def open_files(case: Case) -> Row:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FEW_FILES:
        return warning(f"at most {soft} open files a process: the ranks' connections and a checkpoint may need more",
                       f"ulimit -n {FEW_FILES if hard < 0 else min(hard, 65536)}")
    return ok(f"{soft} a process")


HOST: tuple[Check, ...] = (packages, imports, gpu, compiler, extensions_cache, stale_lock, dev_shm, stale_segments,
                           numactl, encoding, open_files)
