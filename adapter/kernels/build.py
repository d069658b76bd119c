"""The C++ operators of adapter/kernels/csrc: built once for this processor, cached, loaded as torch.ops.qwenvl_tp.

    if (why := native.unavailable()): ...   # None, or in words why this machine has no such operators

The cached library is named after everything that went into it (sources, flags, torch, processor), so that one that is
there is the right one: a home directory shared by unlike hosts, or another torch, builds its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger("adapter")
SOURCES = tuple(sorted(Path(__file__).with_name("csrc").glob("*.cpp")))
HEADERS = tuple(sorted(Path(__file__).with_name("csrc").glob("*.h")))
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-unknown-pragmas")


@cache
def unavailable() -> str | None:
    """Load the operators, building them where they are not cached. None, or in words why this process has none.

    Where DeepSpeed computes on an accelerator nothing is built: they are for CPUs.

    Every process of a host may call it at once: one builds, the others wait for its lock, which dies with it.
    """
    if (device := _device()) != "cpu":
        return f"they are for CPUs, and this job computes on {device}"
    if platform.system() != "Linux":
        return f"they are written for Linux, this is {platform.system()}"
    try:
        library = _cached()
        if not library.exists():
            _build(library)
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError, ImportError) as error:
        return str(error).strip().splitlines()[0]
    return None


def _device() -> str:
    """The kind of device that this process computes on: DeepSpeed's answer where it is imported, else torch's."""
    accelerator = sys.modules.get("deepspeed.accelerator")
    if accelerator is not None:
        return str(accelerator.get_accelerator().device_name())
    return "cuda" if torch.cuda.is_available() else "cpu"


def _cached() -> Path:
    """Where the library of this machine lies."""
    digest = hashlib.blake2b(digest_size=8)
    made_of = *FLAGS, torch.__version__, _processor()
    for part in (*(s.read_bytes() for s in (*SOURCES, *HEADERS)), *map(str.encode, made_of)):
        digest.update(part)
    home = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    return Path(home) / f"qwenvl_tp-{digest.hexdigest()}.so"


def _processor() -> str:
    """What -march=native depends on: architecture and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    sets = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {sets}"


def missing_tools() -> list[str]:
    """What compiling needs and PATH does not have, of ninja and a C++ compiler."""
    from torch.utils.cpp_extension import is_ninja_available

    compiler = os.environ.get("CXX", "c++")
    return ["ninja"] * (not is_ninja_available()) + [compiler] * (not shutil.which(compiler))


def _build(library: Path) -> None:
    """Compile into a directory of its own and move the library to its place: what is there is always whole.

    Raises OSError or RuntimeError saying what is missing or what the compiler printed.
    """
    from torch.utils import cpp_extension

    if missing := missing_tools():
        raise OSError(f"they need ninja and a C++ compiler on PATH; missing: {', '.join(missing)}")
    library.parent.mkdir(parents=True, exist_ok=True)
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return  # another process built it meanwhile
        began = time.perf_counter()
        log.info("compiling the C++ operators, once for this machine ...")
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="qwenvl_tp-") as work:
            cpp_extension.load("qwenvl_tp", list(map(str, SOURCES)), extra_cflags=list(FLAGS),
                               extra_ldflags=["-fopenmp", "-lrt"], build_directory=work, is_python_module=False)
            os.replace(Path(work, "qwenvl_tp.so"), library)
        log.info("compiled in %.0f s", time.perf_counter() - began)
