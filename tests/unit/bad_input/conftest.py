"""`refused`: run a command on bad input and hold it to its promise: exit 2, one message, nothing started or left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import Shape, make_checkpoint
from launching import Job

SMALL = Shape(heads=6, kv_heads=2, head_dim=4, layers=1, mlp=40, vocab=37, v_heads=3, v_head_dim=4, v_layers=1)
Refused = Callable[..., str]
HERE = Path(__file__).parent
LIGHT, FULL = HERE / "imported.py", HERE / "imported_with_processor.py"
LONGEST = 20_000  # characters of a message that a person may still read
LIMIT_S = 120  # of one that imports Transformers, on a busy machine


@pytest.fixture
def refused(tmp_path) -> Refused:
    """refused(command, *args, words=[...]) -> the message. `full`: it needs Transformers."""
    def check(command: str, *args: str, words: tuple[str, ...] | list[str] = (), full: bool = False) -> str:
        preload = FULL if full or command in ("prepare", "processor") else LIGHT
        started = tmp_path.with_name(f"{tmp_path.name}-started")
        job = Job(1, HERE / "command.py", str(started), command, *map(str, args), launcher="alone", cwd=tmp_path,
                  preload=preload)
        end = job.finish(LIMIT_S)
        message = end.err
        assert end.code == 2, (end.code, end.seconds, message[-3000:])
        assert message.startswith("error: "), message[:3000]
        assert "Traceback" not in message, message[-3000:]
        assert message.count("\nerror") == 0 and len(message) < LONGEST, message[:3000]
        assert not started.read_text() and not job.leftovers(), started.read_text()
        assert not end.out, end.out
        for word in words:
            assert word in message, (word, message[:3000])
        return message

    return check


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> dict[int, Path]:
    home = tmp_path_factory.mktemp("sound")
    return {n: make_checkpoint(home / str(n), SMALL, files=n) for n in (1, 2)}


@pytest.fixture
def refuse(refused, tmp_path, sound):
    """refuse(change, words, files=1): copy a sound checkpoint, change it, and run generate on it."""
    def check(change: Callable[[Path], None], words: list[str], files: int = 1) -> str:
        model = Path(shutil.copytree(sound[files], tmp_path / "model"))
        change(model)
        (tmp_path / "c.yaml").write_text("{model: {path: model}, tensor_parallel: {tp_size: 2}}")
        return refused("generate", "--config", tmp_path / "c.yaml", words=words)

    return check
