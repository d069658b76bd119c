"""Processes that the doctor and the benchmark start: their lines, their limits, and nothing left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import Running

from adapter.commands import subprocesses

STUBBORN = """
import os, signal, subprocess, sys, time
if len(sys.argv) > 1:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # in a session of its own, deaf, and its parent may be gone
else:
    subprocess.Popen([sys.executable, "-I", __file__, "child"], start_new_session=True, env={})
    print('{"row": 1}', flush=True)
    print("noise", file=sys.stderr, flush=True)
    if os.path.exists(__file__ + ".leave"):
        sys.exit(3)
time.sleep(600)
"""


def running(script: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(script).encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                pass
    return found


@pytest.fixture
def stubborn(tmp_path, monkeypatch) -> Path:
    """A script that starts a child in a session of its own, without its environment, that does not hear SIGTERM."""
    monkeypatch.setattr(subprocesses, "PATIENCE_S", 1.0)
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    return script


def test_a_job_that_takes_too_long_is_ended_with_all_that_it_started(stubborn):
    ended = subprocesses.run([sys.executable, str(stubborn)], 3.0)
    assert ended.code is None and ended.objects == [{"row": 1}]
    assert "no end after 3 s" in ended.how and "noise" in ended.how
    assert not running(stubborn)


def test_what_outlives_the_job_is_ended_too(stubborn):
    Path(f"{stubborn}.leave").touch()
    ended = subprocesses.run([sys.executable, str(stubborn)], 60.0)
    assert ended.code == 3 and not running(stubborn)


def test_other_children_of_this_process_are_left_alone(stubborn):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        subprocesses.run([sys.executable, str(stubborn)], 1.0)
        assert other.poll() is None
        other.communicate(b"\n")
    assert other.returncode == 0 and not running(stubborn)


def test_a_job_that_crashes_is_reported():
    ended = subprocesses.run([sys.executable, "-c", "raise ValueError('why')"], 60.0)
    assert ended.code == 1 and ended.how == "exit code 1 (ValueError: why)"
    ended = subprocesses.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], 60.0)
    assert ended.code == -signal.SIGKILL and "SIGKILL" in ended.how


def test_rows_errors_and_environment():
    code = ("import os, sys; print('{\"in\": \"' + sys.stdin.read() + os.environ['EXTRA'] + '\"}'); print('no row'); "
            "print('[1]'); print('first', file=sys.stderr); print('second', file=sys.stderr)")
    echoed: list[str] = []
    ended = subprocesses.run([sys.executable, "-c", code], 60.0, {"EXTRA": "b"}, echo=echoed.append)
    assert ended.code == 0 and ended.objects == [{"in": "b"}] and ended.rows[0][0] > 0
    assert ended.err == echoed == ["first", "second"]


def test_segments_that_a_job_leaves_are_removed():
    """Those of its own port; another's job may be starting."""
    names = [f"deepspeed_allreduce_buffer_0_127.0.0.1_{port}_{os.getpid()}" for port in (101, 1010, 202)]
    code = f"[open('/dev/shm/' + name, 'w') for name in {names}]"
    try:
        subprocesses.run([sys.executable, "-c", code], 60.0, port="101")
        assert [Path("/dev/shm", name).exists() for name in names] == [False, True, True]
    finally:
        for name in names:
            Path("/dev/shm", name).unlink(missing_ok=True)


def test_a_job_ends_with_the_process_that_started_it(tmp_path):
    """Killed, which no process can answer to."""
    script = tmp_path / "endless.py"
    script.write_text("import time; print('{}', flush=True); time.sleep(600)")
    code = f"from adapter.commands import subprocesses; subprocesses.run([{sys.executable!r}, {str(script)!r}], 600.0)"
    parent = Running([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not running(script) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running(script)
    parent.process.kill()
    parent.finish(30)
    assert not parent.leftovers()
