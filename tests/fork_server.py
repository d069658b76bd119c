"""Imports what jobs need once, and forks processes that have it: a start costs milliseconds instead of seconds.

    fork_server.py SOCKET PRELOAD.py

SOCKET: number of the descriptor it is asked through. PRELOAD.py: run first; it imports, and must start no thread, since
a fork takes none along. A message is JSON {ranks, script, args, env, cwd, launched} with three descriptors: stdout,
stderr and where the job's process reports.

A job is a process in a session of its own, as a launcher is: it forks the ranks, each runs `script` as `python script`
would, and when one fails it ends the others, as the deepspeed launcher does. `launched`: the ranks get that launcher's
variables and --local_rank; without it one process runs that no launcher has started. The job reports JSON lines:
{"pid", "ranks": [process ids]}, and when the ranks have ended {"code"}. Its process stays, as the parent of whatever
they have left running, until that has ended too.

Nothing outlives its parent: the kernel ends the server with whoever started it, a job with the server, a rank with its
job.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
GRACE_S, KILL_S = 0.5, 5.0  # for the others after a failure; from asking a rank to end to ending it
LARGEST = 1 << 20  # bytes of a message
LIBC = ctypes.CDLL(None, use_errno=True)


def end_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork a job for every message until the socket closes. Returns what to run in a rank, None in the server."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a job here: it reports by itself
    server = os.getpid()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, LARGEST, 3)
        if not message:
            return None
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, f"{len(threads)} threads: a fork would take one of them along"
        if os.fork() == 0:
            end_with(server)
            control.close()
            return run_job(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def run_job(job: dict[str, Any], out: int, err: int, report: int) -> dict[str, Any]:
    """Fork the ranks and stay with them to their end. Returns in a rank only."""
    os.setsid()
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a rank leaves behind becomes this process's child
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stopped)
    for descriptor, standard in ((out, 1), (err, 2)):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    mine, ranks = os.getpid(), []
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            end_with(mine)
            os.close(report)
            become(rank, job)
            return job
        ranks.append(pid)
    tell(report, {"pid": mine, "ranks": ranks})
    tell(report, {"code": wait_for(ranks) & 0xFF})
    for descriptor in (0, 1, 2, report):
        os.close(descriptor)
    while True:
        try:
            os.wait()
        except (ChildProcessError, Stopped):
            os._exit(0)


def become(rank: int, job: dict[str, Any]) -> None:
    """Give this process the signals, variables and arguments that the deepspeed launcher gives a rank."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if job["launched"]:
        size = str(job["ranks"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_SIZE=size, CROSS_RANK="0",
                          CROSS_SIZE="1")
        job["args"].insert(0, f"--local_rank={rank}")


class Stopped(Exception):
    """A signal asked the job to end."""


def stopped(number: int, _frame: object) -> NoReturn:
    raise Stopped(number)


def wait_for(ranks: list[int]) -> int:
    """The exit code of the job: that of the first rank that fails, which ends the others; 1 after a signal."""
    running, code = set(ranks), 0
    try:
        while running and code == 0:
            pid, status = os.wait()
            code = os.waitstatus_to_exitcode(status) if pid in running else 0
            running.discard(pid)
        until(running, GRACE_S)
    except Stopped:
        code = 1
    for number, patience_s in ((signal.SIGTERM, KILL_S), (signal.SIGKILL, KILL_S)):
        for pid in running:
            os.kill(pid, number)
        until(running, patience_s)
    return code


def until(running: set[int], limit_s: float) -> None:
    """Wait for all of `running`, whose ended ones are taken out, for `limit_s` at most."""
    deadline = time.monotonic() + limit_s
    while running and time.monotonic() < deadline:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        running.discard(pid)
        if pid == 0:
            time.sleep(0.01)


def tell(report: int, row: dict[str, Any]) -> None:
    os.write(report, (json.dumps(row) + "\n").encode())


def load(file: Path) -> None:
    """Import a file under its own name, so that a job's script can import it too."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)


def run(script: str, args: list[str]) -> NoReturn:
    """Run a file as `python script args...` does, to the end of this process: it is __main__, its directory comes first
    on the path; threads are waited for and exit handlers called. Only what the parent made is not taken apart."""
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:] = [str(Path(script).parent), *paths, *(p for p in sys.path if p not in paths)]
    sys.argv[:] = [script, *args]
    sys.stdout.reconfigure(write_through=True)  # the launcher starts `python -u`
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__file__ = script
    code = 0
    try:
        exec(compile(Path(script).read_bytes(), script, "exec"), vars(main))
    except SystemExit as end:
        code = exit_code(end)
    except BaseException as error:
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code & 0xFF)


def exit_code(end: SystemExit) -> int:
    """What a process ends with after `end`; a text is written first."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    end_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:] = [str(Path(__file__).resolve().parents[1]), *sys.path[1:]]
    load(Path(sys.argv[2]))
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page of the parent
    if (job := serve(control)) is not None:
        run(job["script"], job["args"])
