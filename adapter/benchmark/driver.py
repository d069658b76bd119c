"""Jobs in turn, each alone on the machine: this project's, its command to the first answer, and the peers'.

Every repeat starts each of them once more, one after the other, so that whatever else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
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
    argv: Callable[[str], list[str]]
    ranks: int
    records: Callable[[Ended], list[Record]]
    own: bool = True


def drive(config: Config, plan: Plan, args: argparse.Namespace, write: Callable[[Record], None]) -> int:
    """Run every task `args.repeats` times. Returns the exit code of a job of ours which failed, or 1 if a peer did."""
    common.clean_up_on_signals()  # children are ended on the way out
    code = common.DONE
    with TemporaryDirectory(prefix="qwenvl-tp-bench-") as home:
        tasks = _tasks(config, plan, args, Path(home))
        for repeat in range(args.repeats):
            for task in list(tasks):
                log.info("repeat %d of %d: %s", repeat + 1, args.repeats, task.name)
                port, threads = str(network.free_port()), str(max(1, usable_cores() // task.ranks))
                ended = run(task.argv(port), args.limit, {"OMP_NUM_THREADS": threads}, port=port,
                            echo=log.info if task.own else None)
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


def _tasks(config: Config, plan: Plan, args: argparse.Namespace, home: Path) -> list[Task]:
    """Ours comes first: it writes the inputs that the peers read."""
    inputs, requests = home / "inputs.safetensors", home / "requests.jsonl"
    requests.write_text(as_line(first_request(config)))
    at_once = ["--requests-at-once", str(args.requests_at_once)]
    return [_ours(plan, args, OURS, *at_once, *(["--inputs-into", str(inputs)] if args.against else [])),
            _first_answer(plan, args, requests),
            *(_ours(plan, args, name, "--requests-at-once", "1", f"weights.format={name}") for name in args.formats),
            *(_peer(name, config, plan, args, inputs) for name in args.against)]


def check(args: argparse.Namespace, plan: Plan, config: Config) -> None:
    """Before anything is started: can the peers that are asked for run? Raises UserError."""
    if args.against and config.model.adapters:
        raise UserError("--against starts programs that load model.path alone: leave model.adapters out, which cost "
                        "no time once they are merged")
    if "vllm" in args.against and not args.vllm_python:
        raise UserError("--against vllm needs --vllm-python PATH, the interpreter of an environment that has vLLM")
    if args.vllm_python and not os.access(args.vllm_python, os.X_OK):
        raise UserError(f"--vllm-python {args.vllm_python}: no such program; the interpreter of an environment that "
                        "has vLLM is needed, such as venv/bin/python")
    if "deepspeed" in args.against:
        from policies.export import injection_policy

        injection_policy(plan.policy, plan.geometry, plan.tp_size)  # raises where stock DeepSpeed cannot


def _failed(ended: Ended) -> int:
    """The exit code of a job of ours that failed. It has reported why on stderr, unless it was killed."""
    if ended.code in (common.CHECK_FAILED, common.BAD_INPUT):
        return ended.code
    print(f"error: the job ended without a result: {ended.how}", file=sys.stderr, flush=True)
    return common.CRASHED if ended.code is None or ended.code < 0 else ended.code


def _ours(plan: Plan, args: argparse.Namespace, engine: str, *more: str) -> Task:
    """`bench` itself as ranks. Its record of the start and the one of its only repeat."""
    own = ["--module", "adapter.benchmark.main", "--config", args.config, "--repeats", "1", "--new", str(args.new),
           *(["--profile"] if args.profile else []), *args.overrides, *more]

    def records(ended: Ended) -> list[Record]:
        return [{**row, "engine": engine} for row in ended.objects if "summary" not in row]

    return Task(f"this project, {engine}", engine, lambda port: [*launcher(plan.tp_size, port), *own], plan.tp_size,
                records)


def _first_answer(plan: Plan, args: argparse.Namespace, requests: Path) -> Task:
    """From the start of the command until the answer of one token is on its stdout."""
    own = ["--module", "adapter.commands.generate", "--config", args.config, *args.overrides, f"requests={requests}",
           "generation={max_new_tokens: 1, do_sample: false, num_beams: 1}", "output=null"]
    return Task("command to first answer", OURS, lambda port: [*launcher(plan.tp_size, port), *own], plan.tp_size,
                lambda ended: [{"command_to_first_answer_s": round(ended.rows[0][0], 4)}])


def _peer(name: str, config: Config, plan: Plan, args: argparse.Namespace, inputs: Path) -> Task:
    ranks = 1 if name == "hf" else plan.tp_size
    own = ["--model", str(config.model.path), "--dtype", config.model.dtype, "--inputs", str(inputs), "--new",
           str(args.new)]
    if name == "vllm":
        own = [str(SCRIPTS / "vllm_peer.py"), *own, "--tp", str(ranks), "--binding", binding(ranks, usable_cores()),
               "--limits", json.dumps(_pixels(config))]
    else:
        own = [str(SCRIPTS / "transformers_peer.py"), *own, "--engine", name]

    def argv(port: str) -> list[str]:
        start: Mapping[str, list[str]] = {
            "hf": [sys.executable], "deepspeed": launcher(ranks, port), "vllm": [str(args.vllm_python)],
            "hf-tp": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-addr",
                      "127.0.0.1", "--master-port", port],
        }
        return [*start[name], *own]

    return Task(name, name, argv, ranks, peer_record, own=False)


def peer_record(ended: Ended) -> list[Record]:
    """What a peer timed, and start_s: from the command to its row which says that the model is ready."""
    ready = next(at for at, row in ended.rows if "ready" in row)
    return [{"start_s": round(ready, 4), **ended.objects[-1]}]


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
