"""Paths for every test: the repository root and the helpers beside this file. No test leaves a job running."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]


@pytest.fixture(autouse=True)
def no_job_survives():
    yield
    from launching import Job

    for job in Job.running:
        job.kill_all()
    Job.running.clear()
