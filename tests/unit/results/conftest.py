"""An output file, and one that a job has completed."""

from __future__ import annotations

import pytest
from output_files import complete
from tqdm import tqdm


@pytest.fixture
def file(tmp_path):
    return tmp_path / "answers.jsonl"


@pytest.fixture
def whole(file):
    """The file of a job that nothing disturbed."""
    complete(file)
    return file.read_bytes()


@pytest.fixture(autouse=True)
def no_bars_of_other_tests():
    """A bar that a stopped job has left would move the next one down a line."""
    yield
    tqdm._instances.clear()
