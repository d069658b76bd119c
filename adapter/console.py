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
from typing import Any, NoReturn

from adapter import command, network
from adapter.launchers import launcher_of
from policies.errors import UserError

MODULES = {"plan": "adapter.plan", "generate": "adapter.generate", "verify": "adapter.verify",
           "shard": "adapter.shard", "bench": "adapter.bench", "doctor": "adapter.doctor.main"}
RANKED = ("generate", "verify")


def start() -> NoReturn:
    """Run the command that sys.argv names to its exit code."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(command.DONE)
    if name not in MODULES:
        print(f"error: {name!r} is no command; there are: {', '.join(MODULES)}", file=sys.stderr)
        sys.exit(command.BAD_INPUT)
    sys.argv = [f"qwenvl-tp {name}", *rest]
    module = importlib.import_module(MODULES[name])
    if name not in RANKED or launcher_of().mark:
        module.start()
    arguments = module.arguments()
    arguments.add_argument("--ranks", type=command.count(1, 4096), metavar="N", help="default: tp_size")
    command.run(lambda args, _: _launch(MODULES[name], args, rest), arguments)


def _launch(module: str, args: argparse.Namespace, rest: list[str]) -> int:
    """Start `module` over ranks with DeepSpeed's launcher, and return its exit code. Raises UserError."""
    from adapter.config import load_config

    config = load_config(args.config, args.overrides, download=False)
    ranks = args.ranks or config.tensor_parallel.tp_size
    if ranks % config.tensor_parallel.tp_size:
        raise UserError(f"--ranks {ranks} is no multiple of tensor_parallel.tp_size = {config.tensor_parallel.tp_size}")
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: stopped.append(received) or _end_children())
    from deepspeed.launcher.runner import main

    try:
        main(["--quiet", "--hostfile", os.devnull, "--num_accelerators", str(ranks), "--master_addr", "127.0.0.1",
              "--master_port", str(network.free_port()), "--module", module, *_without_ranks(rest)])
    except SystemExit as ended:
        if not stopped:
            return ended.code if isinstance(ended.code, int) else command.CRASHED
    return 128 + stopped[0] if stopped else command.DONE


def _end_children() -> None:
    """Ask DeepSpeed's launcher to end its ranks."""
    import psutil

    for child in psutil.Process().children():
        child.send_signal(signal.SIGTERM)


def _without_ranks(rest: list[str]) -> list[str]:
    """The arguments that the ranks take: all but --ranks N."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--ranks")
    return known.parse_known_args(rest)[1]
