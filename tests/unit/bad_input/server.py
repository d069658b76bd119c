"""Runs the real commands on bad input, each in a child forked after the imports, and says how it ended.

    server.py [--requests]      with it also `prepare`, and Transformers and the demo's processor before any fork

JSON lines: {"command", "args", "cwd"} in, {"code", "out", "err", "started", "left", "seconds"} out. A child that runs
for longer than LIMIT_S, or takes more than MEMORY, is ended. `started`: what it did on the way that only a job that has
begun does (sockets, processes, shared memory); `left`: whether a process of it was still there after it had ended.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}  # the former as a command itself sets it

# ruff: noqa: E402, F401  (imported before the fork)
from adapter.checkpoint import safetensors
from adapter.commands import common, generate, plan
from adapter.config import load as config
from adapter.config import schema

DEMO = ROOT / "launch" / "demo" / "checkpoint"
LIMIT_S = 10.0
MEMORY = 2 << 30  # bytes of address space above what the imports take
SIGNS = ("socket.", "subprocess.", "os.fork", "os.posix_spawn", "os.exec", "os.system")


def processor_of(args: argparse.Namespace, results: common.Results) -> int:
    """What generate does with a checkpoint's processor before any rank joins."""
    from adapter.requests.processing import RequestProcessor

    stated = config.load_config(args.config, args.overrides)
    RequestProcessor(stated.model.path, stated.processor, 2000)
    return common.DONE


def preparing():
    from adapter.requests.processing import RequestProcessor

    processor = RequestProcessor(DEMO, schema.Processor(max_pixels=1 << 20), 2000)

    def prepare(args: argparse.Namespace, results: common.Results) -> int:
        """What generate does with requests, without a model: the first that cannot be prepared is the error."""
        for request in config.load_config(args.config, args.overrides).requests:
            processor.prepare(request)
        return common.DONE

    return prepare


COMMANDS = {"plan": plan.main, "generate": generate.main}
if "--requests" in sys.argv:
    COMMANDS |= {"prepare": preparing(), "processor": processor_of}


def arguments() -> argparse.ArgumentParser:
    parser = common.parser("one of launch/'s commands")
    parser.add_argument("--json", action="store_true")
    return parser


def child(job: dict, streams: dict[str, int]) -> None:
    os.setsid()
    os.chdir(job["cwd"])
    os.dup2(streams["out"], 1)
    os.dup2(streams["err"], 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))

    def watch(event: str, details: tuple) -> None:
        if event.startswith(SIGNS) or (event == "open" and str(details[0]).startswith("/dev/shm")):
            os.write(streams["started"], f"{event} {details!r}\n".encode())

    sys.addaudithook(watch)
    sys.argv = [job["command"], *job["args"]]
    common.run(COMMANDS[job["command"]], arguments())


def fork(job: dict, streams: dict[str, int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        child(job, streams)
    except SystemExit as end:
        code = end.code or 0
    finally:
        os._exit(code)


def text(fd: int) -> str:
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, encoding="utf-8", errors="replace", closefd=False) as stream:
        return stream.read(1 << 20)


def run(job: dict) -> dict:
    files = {name: tempfile.TemporaryFile() for name in ("out", "err", "started")}  # noqa: SIM115
    streams = {name: file.fileno() for name, file in files.items()}
    began = time.monotonic()
    pid = fork(job, streams)
    ended = os.pidfd_open(pid)
    if not select.select([ended], [], [], LIMIT_S)[0]:
        os.kill(pid, signal.SIGKILL)
    os.close(ended)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seconds = time.monotonic() - began
    try:
        os.killpg(pid, signal.SIGKILL)
        left = True
    except ProcessLookupError:
        left = False
    return {"code": code, "left": left, "seconds": seconds, **{name: text(fd) for name, fd in streams.items()}}


def main() -> None:
    gc.freeze()  # so that a collection in a child does not copy every page of the parent
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
