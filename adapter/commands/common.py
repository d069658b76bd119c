"""What every command has in common: arguments, logs, where results go, and how errors end the process."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from adapter.config.files import finite
from adapter.parallel.launchers import environment_rank
from policies.errors import BAD_INPUT, CHECK_FAILED, CRASHED, DONE, CheckFailed, UserError

GRACE_S = 20.0  # how long ranks that say nothing let the one that speaks finish; the launcher ends them when it has


def parser(description: str, config_required: bool = True) -> argparse.ArgumentParser:
    """--config FILE and any number of key=value; the launcher's --local_rank is accepted and not needed."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", required=config_required, metavar="FILE", help="YAML file, see configs/")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. tensor_parallel.tp_size=2")
    p.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return p


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` to `most`."""
    def parse(stated: str) -> int:
        if not stated.isdecimal() or not least <= int(stated) <= most:
            raise argparse.ArgumentTypeError(f"{stated!r} is not a whole number from {least} to {most}")
        return int(stated)

    return parse


class Results:
    """JSON lines on the real stdout. Libraries that print go to stderr, so that stdout holds nothing but results."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
        os.dup2(2, 1)

    def write(self, row: dict[str, Any]) -> None:
        self.text(json.dumps(finite(row), ensure_ascii=False, allow_nan=False))

    def give_back(self) -> None:
        """Make stdout what it was, for a process to be started."""
        os.dup2(self._out.fileno(), 1)

    def text(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()


def run(main: Callable[[argparse.Namespace, Results], int], arguments: argparse.ArgumentParser) -> NoReturn:
    """Run a command to its exit code: UserError is a message and 2, CheckFailed a message and 1, anything else a
    traceback and 70."""
    rank = environment_rank("RANK")
    try:
        args = arguments.parse_intermixed_args()  # overrides before, between and after options
    except SystemExit as stop:
        if rank and stop.code:
            time.sleep(GRACE_S)
        raise
    _configure_logs(rank)
    try:
        code = main(args, Results())
    except UserError as error:
        _report(error, rank)
        code = BAD_INPUT
    except CheckFailed as error:
        _report(error, rank)
        code = CHECK_FAILED
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = CRASHED
    _leave(code)


def clean_up_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does: what it has begun to write is removed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))


def _report(error: UserError | CheckFailed, rank: int) -> None:
    """Before the ranks are joined, all of one host find the same error: one of them says it. Later each says its own.

    The silent ones wait a little, since the launcher ends the others as soon as one has ended.
    """
    if _joined():
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    elif environment_rank("LOCAL_RANK") == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(GRACE_S)
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)  # still here: nobody else found it


def _joined() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _configure_logs(rank: int) -> None:
    """Our logger speaks on rank 0 only, and on every rank from warnings up, to stderr. No stream is ever closed."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"rank {rank}: %(message)s" if rank else "%(message)s"))
    log = logging.getLogger("adapter")
    log.addHandler(handler)
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime" on every CPU rank
    warnings.filterwarnings("ignore", r"Image size \(")  # Pillow's, of images that are refused for their size anyway
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated")  # DeepSpeed's call


def _leave(code: int) -> NoReturn:
    """End now: a rank that failed must not wait for others in an exit handler of the process group."""
    if code == DONE and _joined():
        sys.modules["torch"].distributed.destroy_process_group()
    sys.stderr.flush()
    sys.stdout.flush()
    if code == DONE:
        sys.exit(DONE)
    os._exit(code)
