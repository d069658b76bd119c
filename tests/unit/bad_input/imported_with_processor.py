"""Also Transformers, the demo's processor, and two commands that stop where generate would join its ranks."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1",  # the former as a command itself sets it
               "TOKENIZERS_PARALLELISM": "false"}  # no threads before the fork
sys.path.insert(0, str(Path(__file__).resolve().parent))

from imported import COMMANDS

from adapter.commands import common
from adapter.config import load as config
from adapter.config import schema
from adapter.requests.processing import RequestProcessor

DEMO = Path(__file__).resolve().parents[3] / "launch" / "demo" / "checkpoint"
PROCESSOR = RequestProcessor(DEMO, schema.Processor(max_pixels=1 << 20), 2000)


def processor(args: argparse.Namespace, results: common.Results) -> int:
    """What generate does with a checkpoint's processor before any rank joins."""
    stated = config.load_config(args.config, args.overrides)
    RequestProcessor(stated.model.path, stated.processor, 2000)
    return common.DONE


def prepare(args: argparse.Namespace, results: common.Results) -> int:
    """What generate does with requests, without a model: the first that cannot be prepared is the error."""
    for request in config.load_config(args.config, args.overrides).requests:
        PROCESSOR.prepare(request)
    return common.DONE


COMMANDS |= {"prepare": prepare, "processor": processor}
