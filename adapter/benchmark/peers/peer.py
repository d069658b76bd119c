"""What is timed and counted alike in this project's ranks and in every peer. Imports the standard library alone."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

WARM_UP_TOKENS = 2  # the request before the first that counts: buffers, kernels chosen, pages of mapped files

# Of generate's arguments, for Transformers and for ours: no token ends an answer. min_new_tokens would do as well, but
# forbids the end by looking for it in the whole vocabulary, twice a token and 0.8 ms each time.
ENDLESS = {"eos_token_id": None}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The arguments that the driver gives every peer."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="directory of the checkpoint")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--inputs", required=True, help="safetensors: the request as `bench --inputs-into` writes it")
    parser.add_argument("--new", type=int, required=True, help="tokens to generate")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def json_lines() -> Callable[[dict[str, Any]], None]:
    """A writer of JSON lines on the real stdout; what libraries print there goes to stderr from now on."""
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def write(row: dict[str, Any]) -> None:
        out.write(json.dumps(row) + "\n")
        out.flush()

    return write


def speed(began: float, times: Sequence[float]) -> dict[str, float]:
    """From when generation began and when each new token came, in seconds of one clock, at least two of them."""
    return {"ttft_s": round(times[0] - began, 4),
            "decode_tok_s": round((len(times) - 1) / (times[-1] - times[0]), 4)}
