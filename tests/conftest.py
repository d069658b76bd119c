"""Paths for every test: the repository root and the helpers beside this file. No test leaves a job running, and no file
of tests leaves its process the environment of a rank."""

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("tests", deadline=None)  # a machine may be busy
settings.load_profile("tests")

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would ours


@pytest.fixture(autouse=True, scope="module")
def environment_is_given_back():
    """A test that joins a job in this process sets RANK, MASTER_PORT and more, which the next file's jobs would take
    for their own."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True, scope="session")
def no_server_survives():
    yield
    from forking import stop_servers

    stop_servers()


@pytest.fixture(autouse=True)
def no_job_survives():
    yield
    from launching import Job

    for job in Job.running:
        job.kill_all()
    Job.running.clear()
