"""Ranks that are forked, not started: they are what a launcher's are, and nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forking import Server, processes
from launching import Job, launch

TESTS = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.ranks


def script(directory: Path, text: str, name: str = "script.py") -> Path:
    file = directory / name
    file.write_text("import json, os, signal, sys, time\n" + text)
    return file


@pytest.mark.long
def test_a_rank_is_what_the_launcher_s_is(tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT",
             "MINE")
    reported = script(tmp_path, "row = [sys.argv[1:], __name__, os.getcwd(), sys.path[0], sys.stdin.read(),"
                            f"{{name: os.environ.get(name) for name in {names}}}]\n"
                            "os.write(1, (json.dumps(row) + chr(10)).encode())")
    both = []
    for launcher in ("deepspeed", "fork"):
        outcome = launch(2, reported, "a", "--x=c", launcher=launcher, env={"MINE": "x"}, port=29765, cwd=tmp_path)
        assert outcome.code == 0, outcome.err[-3000:]
        both.append(sorted(line for line in outcome.out.splitlines() if line.startswith("[[")))
    assert len(both[0]) == 2 and both[0] == both[1]


def test_alone_it_has_no_launcher_s_variables(tmp_path):
    outcome = launch(1, script(tmp_path, "print(sys.argv[1:], os.environ.get('RANK'))"), "a", launcher="alone")
    assert (outcome.code, outcome.out, outcome.err) == (0, "['a'] None\n", "")


@pytest.mark.parametrize("end, code, words", [
    ("sys.exit(3)", 3, ""), ("sys.exit('gone')", 1, "gone"), ("1 / 0", 1, "ZeroDivisionError"),
    ("os.kill(os.getpid(), signal.SIGKILL)", 256 - 9, ""), ("os._exit(7)", 7, ""),
])
def test_one_rank_s_failure_is_the_job_s_and_ends_the_others(tmp_path, end, code, words):
    outcome = launch(3, script(tmp_path, f"if os.environ['RANK'] == '1':\n    {end}\ntime.sleep(300)"))
    assert outcome.code == code and words in outcome.err and outcome.seconds < 100


def test_exit_handlers_run_and_threads_are_waited_for(tmp_path):
    outcome = launch(1, script(tmp_path, "import atexit, threading\natexit.register(print, 'last')\n"
                                         "threading.Timer(0.2, print, ['first']).start()"))
    assert outcome.out == "first\nlast\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_job_that_ignores_it(tmp_path, number):
    job = Job(2, script(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('here')\n"
                                  "while True:\n    time.sleep(1)"))
    while job.output("stdout").count("here") < 2:
        time.sleep(0.02)
    os.kill(job.process.pid, number)
    assert job.finish(60).code == 1 and not job.leftovers()


@pytest.mark.parametrize("how", ["os.fork() or os.setsid() or os.fork()", "os.fork() or os.fork()"])
def test_what_a_rank_leaves_running_is_found(tmp_path, how):
    """A daemon that took itself out of the session too. It is killed with the job."""
    job = Job(1, script(tmp_path, f"if not ({how}):\n    os.closerange(0, 3)\n    time.sleep(300)\nos._exit(0)"))
    assert job.finish(60).code == 0
    (left,) = job.leftovers(0.5)
    pid = int(left.removeprefix("process "))
    assert pid in processes()
    job.kill_all()
    assert not job.leftovers()


def test_a_name_left_in_shared_memory_is_found_and_another_job_s_is_not(tmp_path):
    names = [Path("/dev/shm", f"qwenvl-tp-test-{os.getpid()}-{which}") for which in "ab"]
    other = script(tmp_path, f"import mmap\nfile = open({str(names[1])!r}, 'w+b')\nfile.truncate(4096)\n"
                             "kept = mmap.mmap(file.fileno(), 4096)\nfile.close()\nprint('mapped')\ntime.sleep(300)",
                   "other.py")
    job = Job(1, other)
    try:
        first = Job(1, script(tmp_path, f"open({str(names[0])!r}, 'w').close()"))
        while "mapped" not in job.output("stdout"):
            time.sleep(0.02)
        first.finish(60)
        assert first.leftovers(0.5) == [str(names[0])]
    finally:
        for name in names:
            name.unlink(missing_ok=True)


def test_everything_ends_with_the_process_that_started_the_server(tmp_path):
    """Killed, it cannot tell anybody."""
    sleeper = script(tmp_path, "print('here')\ntime.sleep(300)")
    code = (f"import sys, time\nsys.path.insert(0, {str(TESTS)!r})\nimport forking, pathlib\n"
            f"made = forking.server(preload=pathlib.Path({str(tmp_path / 'nothing.py')!r}))\n"
            f"import os\njob = made.fork(dict(ranks=2, script={str(sleeper)!r}, args=[], env=dict(os.environ), cwd='/',"
            "launched=True))\nprint(made.process.pid, job.pid, *job.ranks, flush=True)\ntime.sleep(300)")
    (tmp_path / "nothing.py").touch()
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = set(map(int, parent.stdout.readline().split()))
    assert len(pids) == 4 and pids <= processes().keys()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while pids & processes().keys():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_with_a_thread_refuses_to_fork(tmp_path, capfd):
    """The fork would hang where it needs what that thread holds."""
    (tmp_path / "threaded.py").write_text("import threading, time\n"
                                          "threading.Thread(target=time.sleep, args=(300,), daemon=True).start()")
    server = Server(sys.executable, tmp_path / "threaded.py")
    with pytest.raises(AssertionError, match="server has ended"):
        server.fork({"ranks": 1, "script": "none", "args": [], "env": {}, "cwd": "/", "launched": False})
    server.stop()
    assert "2 threads" in capfd.readouterr().err


def test_ranks_sum(tmp_path):
    """With OpenMP's threads, which a process that had computed before its fork could not start."""
    code = ("import torch\nfrom adapter.parallel import parallel_state\ntorch.set_num_threads(2)\n"
            "x = torch.ones(600, 600)\nx = x @ x\nmpu = parallel_state.start(2)\n"
            "os.write(1, b'sum %d\\n' % mpu.tp.all_reduce(x)[0, 0])")
    outcome = launch(2, script(tmp_path, code))
    assert outcome.code == 0, outcome.err[-3000:]
    assert outcome.out.count("sum 1200\n") == 2, outcome.out
