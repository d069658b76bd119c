"""`qwenvl-tp COMMAND --config C`: every command by one name; it starts the ranks that a command needs.

    qwenvl-tp plan      what each rank would hold, and every problem, before anything is loaded
    qwenvl-tp generate  answer the config's requests over tp_size ranks
    qwenvl-tp verify    prove the shards against one process
    qwenvl-tp shard     write one file per rank, which ranks load without slicing
    qwenvl-tp bench     time it, beside other engines
    qwenvl-tp doctor    what is wrong with this machine

`qwenvl-tp COMMAND --help` has the options. generate and verify start DeepSpeed's launcher on this host, with
--ranks N ranks (default: tensor_parallel.tp_size; more make replicas, for generate); where a launcher started this
process already (deepspeed, torchrun, mpirun, srun) it is one of its ranks. Exit codes are the command's.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from adapter.commands import common
from adapter.parallel import network
from adapter.parallel.launchers import launcher_of
from policies.errors import BAD_INPUT, CRASHED, DONE, UserError

if TYPE_CHECKING:
    from adapter.planning.plan import Plan

MODULES = {"plan": "adapter.commands.plan", "generate": "adapter.commands.generate",
           "verify": "adapter.commands.verify", "shard": "adapter.commands.shard", "bench": "adapter.benchmark.main",
           "doctor": "adapter.doctor.main"}
RANKED = ("generate", "verify")


def start() -> NoReturn:
    """Run the command that sys.argv names to its exit code."""
    rest = sys.argv[1:] or ["--help"]
    name = rest.pop(next((i for i, word in enumerate(rest) if not word.startswith("--local")), 0))  # DeepSpeed's option
    if name in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(DONE)
    if name not in MODULES:
        print(f"error: {name!r} is no command; there are: {', '.join(MODULES)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    sys.argv = [f"qwenvl-tp {name}", *rest]
    module = importlib.import_module(MODULES[name])
    if name not in RANKED or launcher_of().mark:
        module.start()
    arguments = module.arguments()
    arguments.add_argument("--ranks", type=int, metavar="N", help="ranks to start (default: tensor_parallel.tp_size)")
    common.run(partial(_launch, MODULES[name], rest), arguments)


def _launch(module: str, rest: list[str], args: argparse.Namespace, results: common.Results) -> int:
    """Start `module` over ranks with DeepSpeed's launcher, and return its exit code. Raises UserError."""
    tp_size = _checked(args).tp_size
    ranks = tp_size if args.ranks is None else args.ranks
    if ranks < 1 or ranks % tp_size:
        raise UserError(f"--ranks {ranks}: a multiple of tensor_parallel.tp_size = {tp_size} is needed")
    stopped: list[int] = []

    def stop(number: int, _: Any) -> None:
        stopped.append(number)
        if not _end_children():
            sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    from deepspeed.launcher.runner import main

    results.give_back()
    try:
        main(["--quiet", "--hostfile", os.devnull, "--num_accelerators", str(ranks), "--master_addr", "127.0.0.1",
              "--master_port", str(network.free_port()), "--module", module, *_without_ranks(rest)])
    except SystemExit as ended:
        if not stopped:
            return ended.code if isinstance(ended.code, int) else CRASHED
    return 128 + stopped[0] if stopped else DONE


def _checked(args: argparse.Namespace) -> Plan:
    """The plan, so that what is wrong is reported once, before anything is downloaded or started. Raises UserError."""
    from adapter.config.hub import described
    from adapter.config.load import load_config
    from adapter.planning.load import checked_plan, stated

    config = load_config(args.config, args.overrides, download=False)
    common.clean_up_on_signals()
    with described(config.model.path, config.model.revision) as directory:
        return checked_plan(directory, **stated(config))[0]


def _end_children() -> int:
    """Ask DeepSpeed's launcher, where it has been started, to end its ranks."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        child.send_signal(signal.SIGTERM)
    return len(children)


def _without_ranks(rest: list[str]) -> list[str]:
    """The arguments that the ranks take: all but --ranks N."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--ranks")
    return known.parse_known_args(rest)[1]


if __name__ == "__main__":
    start()
