"""A model's policy in the words of DeepSpeed or Transformers, as JSON.

    python -m policies MODEL [--dialect injection_policy|partition_config|tp_plan] [--tp-size N]

MODEL is a model directory, of which config.json is read. Without --dialect all three are printed, with what each leaves
whole on every rank and why; those that cannot say it are {"refused": why}. With it, the words alone, ready to be
used; what stays whole goes to stderr. Exit 2 where the dialect refuses or the input is bad.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import stat
import sys
from pathlib import Path
from typing import Any

from policies.errors import UserError
from policies.export import DIALECTS
from policies.registry import policy_for

MOST_BYTES = 16 << 20  # no config.json comes near; more is another file
BAD_INPUT = 2


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m policies", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path, metavar="MODEL", help="a model directory")
    p.add_argument("--dialect", choices=DIALECTS, help="print this one")
    p.add_argument("--tp-size", type=int, default=2, metavar="N", help="ranks (default: 2)")
    args = p.parse_args()
    try:
        print(json.dumps(_answer(_read(args.model), args.dialect, args.tp_size), indent=2))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _answer(config: dict[str, Any], dialect: str | None, tp_size: int) -> dict[str, Any]:
    policy = policy_for(config)
    geometry = policy.geometry(config)
    if dialect:
        translation = DIALECTS[dialect](policy, geometry, tp_size)
        for module, why in translation.whole.items():
            print(f"whole on every rank: {module}: {why}", file=sys.stderr)
        return translation.words
    answers: dict[str, Any] = {}
    for name, say in DIALECTS.items():
        try:
            translation = say(policy, geometry, tp_size)
            answers[name] = {"words": translation.words, "whole": translation.whole}
        except UserError as error:
            answers[name] = {"refused": str(error)}
    return answers


def _read(directory: Path) -> dict[str, Any]:
    """config.json of a model directory. Raises UserError; no fifo is waited for, no endless file read."""
    file = directory / "config.json"
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            facts = os.fstat(stream.fileno())
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > MOST_BYTES:
                raise UserError(f"{file}: a regular file of at most {MOST_BYTES} bytes is needed")
            config = json.loads(stream.read(MOST_BYTES).decode())
    except FileNotFoundError:
        raise UserError(f"{directory}: no config.json here; a model directory is needed") from None
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: holds a {type(config).__name__}, a mapping is needed")
    return config


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, silently
    sys.exit(main())
