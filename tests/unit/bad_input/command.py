"""One of launch/'s commands, in a process that may not take more than MEMORY, and says what it did on the way that only
a job that has begun does (sockets, processes, shared memory).

    command.py STARTED COMMAND ARGS...      STARTED: the file where it says so
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from imported import COMMANDS

from adapter.commands import common

MEMORY = 2 << 30  # bytes of address space above what the imports take
SIGNS = ("socket.", "subprocess.", "os.fork", "os.posix_spawn", "os.exec", "os.system")

name, started, command, *sys.argv[1:] = sys.argv
sys.argv[0] = command
reported = os.open(started, os.O_WRONLY | os.O_CREAT)
used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def watch(event: str, details: tuple) -> None:
    if event.startswith(SIGNS) or (event == "open" and str(details[0]).startswith("/dev/shm")):
        os.write(reported, f"{event} {details!r}\n".encode())


sys.addaudithook(watch)
arguments = common.parser("one of launch/'s commands")
arguments.add_argument("--json", action="store_true")
common.run(COMMANDS[command], arguments)
