"""Jobs in turn, each alone on the machine: this project's, its command to the first answer, and the peers'.

Every repeat starts each of them once more, one after the other, so that whatever else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter.benchmark.request import as_line, first_request
from adapter.benchmark.summary import OURS
from adapter.commands import common
from adapter.commands.subprocesses import Ended, launcher, run
from adapter.config.schema import Config
from adapter.parallel import network
from adapter.parallel.cpu import usable_cores
from adapter.planning.plan import Plan
from policies.errors import UserError

log = logging.getLogger("adapter")
Record = dict[str, Any]
PEERS = ("hf", "hf-tp", "deepspeed", "vllm")
SCRIPTS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Task:
    """One job to start and time.

    name: for people. argv: the command, given a free port. ranks: how many share the cores. records: what the process
    reported -> records of the results. own: part of this project, whose failure ends the benchmark.
    """

    name: str
    engine: str
    argv: Callable[[int], list[str]]
    ranks: int
    records: Callable[[Ended], list[Record]]
    own: bool = True


def drive(config: Config, plan: Plan, args: argparse.Namespace, write: Callable[[Record], None]) -> int:
    """Run every task `args.repeats` times. Returns the exit code of a job of ours which failed, or 1 if a peer did."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended on the way out
    code = common.DONE
    with ExitStack() as files:
        requests = files.enter_context(memory_file(as_line(first_request(config))))
        tasks = [_ours(plan, args, OURS, args.requests_at_once), _first_answer(plan, args, requests),
                 *(_ours(plan, args, name, 1, f"weights.format={name}") for name in args.formats)]
        if args.against:
            inputs = files.enter_context(memory_file())
            command = [sys.executable, "-m", "adapter.benchmark.main", "--config", args.config, "--inputs-into", inputs,
                       "--new", str(args.new), *args.overrides]
            prepared = _run(Task("inputs", OURS, lambda _: command, 1, lambda _: []), args)
            if prepared.code != common.DONE:
                return _failed(prepared)
            tasks += [_peer(name, config, plan, args, inputs) for name in args.against]
        for repeat in range(args.repeats):
            for task in list(tasks):
                log.info("repeat %d of %d: %s", repeat + 1, args.repeats, task.name)
                ended = _run(task, args)
                if ended.code == common.DONE:
                    for record in task.records(ended):
                        write({"engine": task.engine, **record, "repeat": repeat})
                elif task.own:
                    return _failed(ended)
                else:
                    log.warning("%s: %s; its last lines:\n%s", task.name, ended.how, "\n".join(ended.err[-20:]))
                    write({"engine": task.engine, "repeat": repeat, "error": ended.how})
                    tasks.remove(task)
                    code = common.CHECK_FAILED
    return code


def check(args: argparse.Namespace, plan: Plan) -> None:
    """Before anything is started: can the peers that are asked for run? Raises UserError."""
    if "vllm" in args.against and not args.vllm_python:
        raise UserError("--against vllm needs --vllm-python PATH, the interpreter of an environment that has vLLM")
    if args.vllm_python and not os.access(args.vllm_python, os.X_OK):
        raise UserError(f"--vllm-python {args.vllm_python}: no such program; the interpreter of an environment that "
                        "has vLLM is needed, such as venv/bin/python")
    if "deepspeed" in args.against:
        from policies.export import injection_policy

        injection_policy(plan.policy, plan.geometry, plan.tp_size)  # raises where stock DeepSpeed cannot


def _run(task: Task, args: argparse.Namespace) -> Ended:
    port, threads = network.free_port(), max(1, usable_cores() // task.ranks)
    return run(task.argv(port), args.limit, {"OMP_NUM_THREADS": str(threads)}, port=str(port),
               echo=log.info if task.own else None)


def _failed(ended: Ended) -> int:
    """The exit code of a job of ours that failed. It has reported why on stderr, unless it was killed."""
    if ended.code in (common.CHECK_FAILED, common.BAD_INPUT):
        return ended.code
    print(f"error: the job ended without a result: {ended.how}", file=sys.stderr, flush=True)
    return common.CRASHED if ended.code is None or ended.code < 0 else ended.code


def _ours(plan: Plan, args: argparse.Namespace, engine: str, at_once: int, *overrides: str) -> Task:
    """`bench` itself as ranks. Its record of the start and the one of its only repeat."""
    own = ["--module", "adapter.benchmark.main", "--config", args.config, "--repeats", "1", "--new", str(args.new),
           "--requests-at-once", str(at_once), *(["--profile"] if args.profile else []), *args.overrides, *overrides]

    def records(ended: Ended) -> list[Record]:
        return [{**row, "engine": engine} for row in ended.objects if "summary" not in row]

    return Task(" ".join(["this project", *overrides]), engine, lambda port: [*launcher(plan.tp_size, port), *own],
                plan.tp_size, records)


def _first_answer(plan: Plan, args: argparse.Namespace, requests: str) -> Task:
    """From the start of the command until the answer of one token is on its stdout."""
    own = ["--module", "adapter.commands.generate", "--config", args.config, *args.overrides, f"requests={requests}",
           "generation={max_new_tokens: 1, do_sample: false, num_beams: 1}", "output=null"]
    return Task("command to first answer", OURS, lambda port: [*launcher(plan.tp_size, port), *own], plan.tp_size,
                lambda ended: [{"command_to_first_answer_s": round(ended.rows[0][0], 4)}])


def _peer(name: str, config: Config, plan: Plan, args: argparse.Namespace, inputs: str) -> Task:
    ranks = 1 if name == "hf" else plan.tp_size
    own = ["--model", str(config.model.path), "--dtype", config.model.dtype, "--inputs", inputs, "--new", str(args.new)]
    if name == "vllm":
        own = [str(SCRIPTS / "vllm_peer.py"), *own, "--tp", str(ranks), "--binding", binding(ranks, usable_cores()),
               "--limits", json.dumps(_pixels(config))]
    else:
        own = [str(SCRIPTS / "transformers_peer.py"), *own, "--engine", name]

    def argv(port: int) -> list[str]:
        start: Mapping[str, list[str]] = {
            "hf": [sys.executable], "deepspeed": launcher(ranks, port), "vllm": [str(args.vllm_python)],
            "hf-tp": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-addr",
                      "127.0.0.1", "--master-port", str(port)],
        }
        return [*start[name], *own]

    return Task(name, name, argv, ranks, merged, own=False)


def merged(ended: Ended) -> list[Record]:
    """A peer's rows, one of each rank, as one: what rank 0 timed, and of every rank the memory, in their order.
    start_s: from the command to the row in which the last rank reported that its model was ready."""
    rows = sorted((row for row in ended.objects if "rank" in row), key=lambda row: int(row["rank"]))
    each = [name for name in rows[0] if name.endswith("_bytes") and not isinstance(rows[0][name], list)]
    ready = [at for at, row in ended.rows if "ready" in row]
    return [{"start_s": round(max(ready), 4)} | rows[0] | {name: [row[name] for row in rows] for name in each}]


def binding(ranks: int, cores: int) -> str:
    """Cores of each rank in vLLM's words, "0-1|2-3"; ranks beyond the cores share them."""
    each = max(1, cores // ranks)
    spans = [(rank * each % cores, rank * each % cores + each - 1) for rank in range(ranks)]
    return "|".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def _pixels(config: Config) -> dict[str, int]:
    """The limits of an image's pixels that the request, or else the config, states."""
    request, section = first_request(config), config.processor
    limits = {name: getattr(request, name) or getattr(section, name) for name in ("min_pixels", "max_pixels")}
    return {name: value for name, value in limits.items() if value is not None}


@contextmanager
def memory_file(content: str = "") -> Iterator[str]:
    """A path that children can read and write while this process lives, and that no file system keeps."""
    fd = os.memfd_create("bench")
    try:
        os.write(fd, content.encode())
        yield f"/proc/{os.getpid()}/fd/{fd}"
    finally:
        os.close(fd)
