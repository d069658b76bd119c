"""Hosts made of namespaces, joined by a switch: what a job of several machines sees, on one machine.

    from hosts import hosts, need_hosts
    pytestmark = [pytest.mark.ranks, need_hosts]

    with hosts("hA", "hB") as (a, b):
        jobs = [h.start(["deepspeed", "--hostfile", ..., "--node_rank", str(i), ...]) for i, h in enumerate((a, b))]
        b.cut()                       # the cable: no packet passes, nobody is notified; b.mend() plugs it in again
        b.kill()                      # every process of the host dies at once; b.power_off() is cut() and kill()
        outcomes = [job.finish(60) for job in jobs]         # `launching.Running`: code, out, err, seconds
        assert not a.leftovers() + b.leftovers()

`start` is `launching.Running` inside the host; `run` waits and returns subprocess's CompletedProcess; `processes` are
process ids as this machine sees them. Each host has its own network (lo and eth0, the others reachable by name and by
`address`), host name, processes, IPC, /dev/shm and mounts (`mount_file`, `mount_empty` change what lies at a path for
it alone). All other files are shared, as on a cluster's file system.

Nothing has a name outside: namespaces live as long as their first process, which the kernel ends with the test, so that
a killed test leaves nothing either. Needs root (CAP_SYS_ADMIN), util-linux and iproute2; `need_hosts` skips without.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from launching import Running

# The first process of a host: says that it is there, reaps what is orphaned, ends when it is killed.
INIT = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print(flush=True)\nwhile True: signal.pause()"
INTERFACE = "eth0"  # of each host; the switch's end of the same cable has the host's name


@dataclass
class Namespaces:
    """A first process in namespaces of its own. pid: its id as this machine sees it."""

    process: subprocess.Popen
    pid: int

    @classmethod
    def make(cls, *kinds: str) -> Namespaces:
        argv = ["setpriv", "--pdeathsig", "KILL", "unshare", *kinds, "--fork", "--kill-child",
                sys.executable, "-ISc", INIT]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if not process.stdout.readline():  # the first process is not there
            raise OSError(f"no namespaces: {process.communicate()[1].decode().strip()}")
        return cls(process, int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()))

    def inside(self, *argv: str) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "--all", *argv]

    def end(self) -> None:
        """Every process in them, at once and for good."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.communicate()


@dataclass
class Host:
    name: str
    address: str
    namespaces: Namespaces
    switch: Namespaces
    files: set[str] = field(default_factory=set)  # paths that have a file of this host's own

    def command(self, *argv: str) -> list[str]:
        """argv as a command that runs inside, with the working directory and environment of the caller."""
        return ["nsenter", "-t", str(self.namespaces.pid), "--all", f"--wd={os.getcwd()}", *argv]

    def run(self, *argv: str, timeout: float = 60, **options) -> subprocess.CompletedProcess:
        return subprocess.run(self.command(*argv), capture_output=True, text=True, timeout=timeout, check=False,
                              stdin=subprocess.DEVNULL, **options)

    def start(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> Running:
        return Running(self.command(*argv), env)

    def processes(self) -> dict[int, str]:
        """Process id, as this machine sees it -> command line, of all that runs in the host (without its first)."""
        mine = _namespace(self.namespaces.pid)
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.namespaces.pid:
                with suppress(OSError):
                    if _namespace(int(entry.name)) == mine:
                        found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
        return found

    def listening(self) -> set[tuple[str, int]]:
        """Addresses and ports that something in the host listens on: ("any", 29500), ("127.0.0.1", 4711), ..."""
        found = set()
        for line in self.run("ss", "--listening", "--tcp", "--numeric", "--no-header").stdout.splitlines():
            address, _, port = line.split()[3].rpartition(":")
            found.add(("any" if address in ("*", "0.0.0.0", "[::]") else address, int(port)))
        return found

    def shared_memory(self) -> set[str]:
        return set(os.listdir(self.path("/dev/shm")))

    def leftovers(self, wait_s: float = 10) -> list[str]:
        """Processes, names in /dev/shm and listeners that are left after `wait_s` at most; none without power."""
        if self.namespaces.process.poll() is not None:
            return []
        deadline = time.monotonic() + wait_s
        while True:
            left = [f"{self.name}: process {pid} ({line})" for pid, line in self.processes().items()]
            left += [f"{self.name}: /dev/shm/{name}" for name in self.shared_memory()]
            left += [f"{self.name}: listening on {address}:{port}" for address, port in self.listening()]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.1)

    def path(self, path: str) -> Path:
        """What lies at `path` for this host, for this machine to read and write."""
        return Path(f"/proc/{self.namespaces.pid}/root{path}")

    def mount_file(self, path: str, text: str) -> None:
        """A file at an existing path, for this host alone. Again: another text there."""
        if path not in self.files:
            with tempfile.NamedTemporaryFile() as file:
                os.chmod(file.name, 0o644)
                self.must("mount", "--bind", file.name, path)
            self.files.add(path)
        self.path(path).write_text(text)

    def mount_empty(self, path: str) -> None:
        """An empty directory at an existing one, for this host alone."""
        self.must("mount", "-t", "tmpfs", "tmpfs", path)

    def must(self, *argv: str) -> None:
        """Run it; OSError with what it printed where it fails."""
        _must(self.command(*argv))

    def cut(self) -> None:
        """From now on no packet passes, in silence: the host's own interface stays up."""
        _must(self.switch.inside("ip", "link", "set", self.name, "nomaster"))

    def mend(self) -> None:
        _must(self.switch.inside("ip", "link", "set", self.name, "master", "switch"))

    def unplug(self) -> None:
        """The interface has no carrier any more, and the host can know it."""
        _must(self.switch.inside("ip", "link", "set", self.name, "down"))

    def kill(self) -> None:
        """Kill every process of the host but its first; its kernel lives on and closes their connections."""
        self.run(sys.executable, "-ISc", "import os; os.kill(-1, 9)")

    def power_off(self) -> None:
        """The host is gone, and nobody is notified."""
        self.cut()
        self.namespaces.end()


def _namespace(pid: int) -> int:
    return os.stat(f"/proc/{pid}/ns/pid").st_ino


def _must(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise OSError(f"{' '.join(argv)}: {done.stderr.strip()}")


@contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """One host a name. Everything in them ends with the block."""
    addresses = {name: f"10.77.0.{i}" for i, name in enumerate(names, 1)}
    with ExitStack() as stack:
        switch = Namespaces.make("--net")
        stack.callback(switch.end)
        for argv in (["link", "add", "switch", "type", "bridge"], ["link", "set", "switch", "up"]):
            _must(switch.inside("ip", *argv))
        made = []
        for name, address in addresses.items():
            own = Namespaces.make("--net", "--uts", "--ipc", "--mount", "--pid", "--mount-proc")
            stack.callback(own.end)
            made.append(Host(name, address, own, switch))
            _furnish(made[-1], addresses)
        yield made


def _furnish(host: Host, addresses: Mapping[str, str]) -> None:
    """Name, network, names of the others, shared memory."""
    own, switch = host.namespaces, host.switch
    _must(switch.inside("ip", "link", "add", host.name, "type", "veth", "peer", "name", INTERFACE, "netns",
                        str(own.pid)))
    _must(switch.inside("ip", "link", "set", host.name, "master", "switch", "up"))
    for argv in (["hostname", host.name], ["ip", "link", "set", "lo", "up"],
                 ["ip", "address", "add", f"{host.address}/24", "dev", INTERFACE],
                 ["ip", "link", "set", INTERFACE, "up"]):
        _must(own.inside(*argv))
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    host.mount_file("/etc/hosts", "\n".join(lines) + "\n")
    host.mount_empty("/dev/shm")


@cache
def why_not() -> str:
    """Why hosts cannot be made here; "" where they can."""
    missing = [tool for tool in ("setpriv", "unshare", "nsenter", "ip", "ss", "mount") if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)} not found: install util-linux and iproute2"
    try:
        with hosts("hA"):
            return ""
    except OSError as error:
        return f"{error} (root with CAP_SYS_ADMIN and CAP_NET_ADMIN is needed)"


need_hosts = pytest.mark.skipif(bool(why_not()), reason=f"JOBS OF SEVERAL HOSTS ARE NOT TESTED: {why_not()}")
