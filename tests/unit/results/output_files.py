"""Configs with an output file, rows for it, and what a job does with the file."""

from __future__ import annotations

import json
import multiprocessing
import threading

import pytest
from launching import ROOT
from tqdm import tqdm

from adapter.config.load import from_dict
from adapter.requests.results import Recorded
from policies.errors import UserError

DEMO = ROOT / "launch" / "demo" / "checkpoint"
NAMES = ("first", "zweite ü", "第三")


def config(output, names=NAMES, **sections):
    requests = sections.pop("requests", [{"id": name, "prompt": f"What is {name}?"} for name in names])
    return from_dict({"model": {"path": str(DEMO)}, "requests": requests, "output": str(output), **sections})


def row(name, **more):
    return {"id": name, "answer": f"→ {name} 🟦", "new_tokens": 2, **more}


def complete(path, names=NAMES, **sections):
    """Do what is missing; returns which were."""
    recorded = Recorded(config(path, names, **sections))
    missing = [name for name in names if name not in recorded.done]
    recorded.add(0, [row(name) for name in missing])
    recorded.finish()
    return missing


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(path, words, **sections):
    before = path.read_bytes()
    with pytest.raises(UserError, match=words) as error:
        Recorded(config(path, **sections))
    assert str(path) in str(error.value) and path.read_bytes() == before


def forked(function):
    """A process of its own that does it and then nothing else. tqdm's lock is one that processes share: one that is
    killed would keep it from the others."""
    def work():
        tqdm.set_lock(threading.RLock())
        function()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process
