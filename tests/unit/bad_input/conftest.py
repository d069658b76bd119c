"""`refused`: run a command on bad input and hold it to its promise: exit 2, one message, nothing started or left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Refused = Callable[..., str]
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
LONGEST = 20_000  # characters of a message that a person may still read


def serve(*options: str) -> Iterator[Callable[..., dict]]:
    """ask(command, *args, cwd=...) -> how it ended, by one server for all tests."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHERS} | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, Path(__file__).with_name("server.py"), *options], env=environment,
                              text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(command: str, *args: str, cwd: Path) -> dict:
        server.stdin.write(json.dumps({"command": command, "args": [str(a) for a in args], "cwd": str(cwd)}) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield ask
    server.stdin.close()
    assert server.wait(10) == 0


@pytest.fixture(scope="session")
def light_server():
    """Forks in 2 ms. Whatever needs Transformers imports it in the child."""
    yield from serve()


@pytest.fixture(scope="session")
def full_server():
    yield from serve("--requests")


@pytest.fixture
def refused(request, tmp_path) -> Refused:
    """refused(command, *args, words=[...]) -> the message. `full`: it needs Transformers."""
    def check(command: str, *args: str, words: tuple[str, ...] | list[str] = (), full: bool = False) -> str:
        ask = request.getfixturevalue("full_server" if full or command in ("prepare", "processor") else "light_server")
        end = ask(command, *args, cwd=tmp_path)
        message = end["err"]
        assert end["code"] == 2, (end["code"], end["seconds"], message[-3000:])
        assert message.startswith("error: "), message[:3000]
        assert "Traceback" not in message, message[-3000:]
        assert message.count("\nerror") == 0 and len(message) < LONGEST, message[:3000]
        assert not end["started"] and not end["left"], end["started"]
        assert not end["out"], end["out"]
        for word in words:
            assert word in message, (word, message[:3000])
        return message

    return check
