"""What a machine is and what it allows a process: read from the kernel with the standard library alone.

adapter.doctor reads it when torch or DeepSpeed may be broken, so nothing here needs a package.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from adapter.parallel.launchers import Launch, environment_rank, launcher_of

T = TypeVar("T")
CGROUPS = Path("/sys/fs/cgroup")
SHM = Path("/dev/shm")
SIOCGIFADDR = 0x8915
LOCAL_SIZES = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
SHOWN = (  # beginnings of the names of environment variables that say how a job was started and what steers it
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "CROSS_", "MASTER_",
    "OMPI_COMM_",
    "OMPI_MCA_", "PMI_", "PMIX_RANK", "MPI_LOCAL", "SLURM_", "TORCHELASTIC_", "GLOO_", "NCCL_", "TORCH_", "PYTORCH_",
    "UCX_", "FI_", "CCL_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "DS_", "DEEPSPEED_", "CUDA_", "NVIDIA_",
    "ROCR_", "HIP_", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN",
    "TRANSFORMERS_OFFLINE", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "CXX", "CC",
    "LANG", "LC_", "XDG_CACHE_HOME", "TMPDIR",
)
SECRET = re.compile(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL|AUTH|COOKIE|JWT|_URI|PROXY", re.IGNORECASE)
LONGEST = 200  # characters of a value that are shown


def bounded(call: Callable[[], T], seconds: float) -> T:
    """call(), or TimeoutError: a look-up or a file system that does not answer must not hold up the rest."""
    done: list[T] = []
    broke: list[BaseException] = []

    def work() -> None:
        try:
            done.append(call())
        except BaseException as error:  # told to the caller, whatever it is
            broke.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if broke:
        raise broke[0]
    if not done:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return done[0]


def first_line(argv: list[str]) -> str | None:
    """The first line that a command prints, None where there is no such command or it does not answer."""
    try:
        told = subprocess.run(argv, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter((told.stdout or told.stderr).splitlines()), None)


def shown_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables an issue report needs; of those that look like secrets only that they are set."""
    return {name: _shown(name, value) for name, value in sorted(environ.items()) if name.startswith(SHOWN)}


def _shown(name: str, value: str) -> str:
    if SECRET.search(name):
        return "(set, not shown)"
    value = re.sub(r"//[^/@\s]*@", "//(not shown)@", value)
    return value if len(value) <= LONGEST else f"{value[:LONGEST]}..."


def system() -> dict[str, Any]:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        name = ""
    return {"os": name or platform.system(), "kernel": platform.release(), "libc": " ".join(platform.libc_ver()),
            "machine": platform.machine(), "host": socket.gethostname()}


def cpu() -> dict[str, Any]:
    """Model and counts. usable: what affinity and the container's quota leave of them."""
    text = _read(Path("/proc/cpuinfo"))
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    physical = set(zip(re.findall(r"^physical id\s*: (\d+)$", text, re.MULTILINE),
                       re.findall(r"^core id\s*: (\d+)$", text, re.MULTILINE), strict=False))
    return {"model": model.group(1) if model else platform.processor(), "physical": len(physical) or None,
            "logical": os.cpu_count(), "affinity": span(os.sched_getaffinity(0)), "quota": quota(),
            "usable": usable_cores(), "numa_nodes": numa_nodes()}


def numa_nodes() -> int:
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1


def span(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def usable_cores() -> int:
    """Cores this process may use at once."""
    cores = len(os.sched_getaffinity(0))
    share = quota()
    return cores if share is None else max(1, min(cores, int(share)))


def quota() -> float | None:
    """How many cores the CPU quota of this process's cgroups (v2 or v1) is worth; None: no quota."""
    shares = []
    for directory in _cgroups("cpu"):
        words = _read(directory / "cpu.max").split() or [
            _read(directory / "cpu.cfs_quota_us").strip(), _read(directory / "cpu.cfs_period_us").strip()]
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit():  # "max" and -1: none
            shares.append(int(words[0]) / int(words[1]))
    return min(shares, default=None)


def memory() -> dict[str, int | None]:
    """Bytes. limit: of the container, where it has one."""
    limits = [bound for bound, _ in _memory_limits()]
    return {"total": _meminfo("MemTotal"), "available": available_memory(), "limit": min(limits, default=None)}


def available_memory() -> int:
    """Bytes that new processes can have: of the machine, or what is left of the container's limit."""
    return min([_meminfo("MemAvailable"), *(max(0, bound - used) for bound, used in _memory_limits())])


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, in use) of each cgroup around this process that has a limit; files in the page cache are not in use."""
    for directory in _cgroups("memory"):
        for bound, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            stated, taken = _read(directory / bound).strip(), _read(directory / used).strip()
            if stated.isdigit() and taken.isdigit() and int(stated) < 1 << 60:  # v1 says "none" with a huge number
                cached = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(directory / "memory.stat"), re.MULTILINE)
                yield int(stated), int(taken) - (int(cached.group(1)) if cached else 0)


def _cgroups(controller: str) -> Iterator[Path]:
    """The cgroup directories of this process from its own up to the root, v2 and v1."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        below = path.strip("/")
        while True:
            yield root / below
            if not below:
                break
            below = below.rpartition("/")[0]


def _meminfo(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _read(Path("/proc/meminfo")), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def shm_bytes() -> tuple[int, int]:
    """(size, free) of /dev/shm."""
    facts = os.statvfs(SHM)
    return facts.f_blocks * facts.f_frsize, facts.f_bavail * facts.f_frsize


def interfaces() -> dict[str, str]:
    """Name -> IPv4 address, empty where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        return {name: _address(s, name) for _, name in socket.if_nameindex()}


def _address(s: socket.socket, interface: str) -> str:
    try:
        answer = fcntl.ioctl(s.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except OSError:
        return ""
    return socket.inet_ntoa(answer[20:24])


def route(address: str) -> str:
    """The interface whose packets reach this IPv4 address; nothing is sent. Raises OSError where none does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((address, 9))
        mine = s.getsockname()[0]
    return next((name for name, own in interfaces().items() if own == mine), mine)


def resolve(host: str) -> str:
    """IPv4 address of a host name. Raises OSError; a name server that does not answer is one too."""
    return bounded(lambda: socket.gethostbyname(host), 10)


def process(pid: int) -> tuple[int, str, float]:
    """(pid, whether it runs or is stopped or gone, its age in seconds)."""
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    if not fields:
        return pid, "gone", 0.0
    up = float(_read(Path("/proc/uptime")).split()[0]) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return pid, {"T": "stopped", "t": "stopped", "Z": "gone"}.get(fields[0], "running"), up


def lockers(file: Path) -> list[int]:
    """Processes that hold a lock on this file."""
    try:
        inode = file.stat().st_ino
    except OSError:
        return []
    lines = [line.split() for line in _read(Path("/proc/locks")).splitlines()]
    holding = {int(words[4]) for words in lines if words[1] != "->" and words[5].endswith(f":{inode}")}
    return [pid for pid in openers(file) if pid in holding]  # an inode is of its own file system only


def openers(file: Path) -> list[int]:
    """Processes that have this file open, of those this one may look at."""
    return [int(pid.name) for pid in _processes() if any(_links_to(fd, file) for fd in _entries(pid / "fd"))]


def mapped(files: Collection[Path]) -> set[Path]:
    """Those that some process has in its memory, of the processes this one may look at."""
    if not files:
        return set()
    maps = "".join(_read(pid / "maps") for pid in _processes())
    return {file for file in files if f" {file}\n" in maps}


def _processes() -> Iterator[Path]:
    return (entry for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:  # gone, or not ours to look at
        return []


def _links_to(link: Path, file: Path) -> bool:
    try:
        return os.readlink(link) == str(file)
    except OSError:
        return False


def _read(file: Path) -> str:
    """Its text, empty where it cannot be read."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def place(environ: Mapping[str, str]) -> Launch | None:
    """Where a launcher's environment says this process stands, before MPI is asked; None: started without one."""
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


def which(command: str, environ: Mapping[str, str]) -> str | None:
    return shutil.which(command, path=environ.get("PATH"))


def nvidia_driver() -> str | None:
    found = re.search(r"Module\s+(\S+)", _read(Path("/proc/driver/nvidia/version")))
    return found.group(1) if found else None
