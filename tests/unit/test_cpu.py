"""The cores that a process may use: affinity, the quotas of nested cgroups, and what the choice of all-reduce sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from launching import ROOT

from adapter.parallel import cpu
from adapter.parallel.all_reduce import too_few_cores

CODE = """
import json, os
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
from adapter.parallel.all_reduce import too_few_cores
from adapter.parallel.cpu import affinity, usable_cores
print(json.dumps([usable_cores(), too_few_cores(2, [sorted(affinity())] * 2, [None] * 2)]))
"""


def test_a_process_bound_to_one_core_sees_one():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    cores, why = json.loads(done.stdout.splitlines()[-1])
    assert cores == 1 and why == "it busy-waits, too slow with 2 ranks on 1 core"


@pytest.mark.parametrize("tp_size, cores, quotas, why", [
    (2, [[0, 1], [0, 1]], [None, None], None),
    (2, [[0], [1]], [None, None], None),  # deepspeed --bind_cores_to_rank: each has a core of its own
    (2, [[3], [3]], [None, None], "2 ranks on 1 core"),
    (4, [[0, 1]] * 4, [None] * 4, "4 ranks on 2 cores"),
    (2, [[0, 1, 2, 3]] * 2, [None, 1.5], "2 ranks on 1 core"),  # the smallest quota of any
    (2, [[0, 1, 2, 3]] * 2, [2.0, 8.0], None),
])
def test_deepspeeds_op_needs_a_core_for_each_rank(tp_size, cores, quotas, why):
    found = too_few_cores(tp_size, cores, quotas)
    assert found is None if why is None else found.endswith(why)


@pytest.fixture
def cgroups(monkeypatch, tmp_path):
    """cgroup v2 with this process in /job/step; returns a function that writes a file there."""
    monkeypatch.setattr(cpu, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cpu, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(cpu, "affinity", lambda: set(range(8)))
    (tmp_path / "own").write_text("1:cpu:/elsewhere\n0::/job/step\n")

    def write(directory, text):
        (tmp_path / "cgroup" / directory).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / directory / "cpu.max").write_text(text)

    return write


def test_the_smallest_quota_around_a_process_counts(cgroups):
    assert cpu.cpu_quota() is None and cpu.usable_cores() == 8, "no controller, no quota"
    cgroups("job/step", "max 100000")
    assert cpu.cpu_quota() is None
    cgroups("job", "250000 100000")
    assert cpu.cpu_quota() == 2.5 and cpu.usable_cores() == 2
    cgroups("job/step", "50000 100000")
    assert cpu.cpu_quota() == 0.5 and cpu.usable_cores() == 1, "at least one"
    cgroups("", "10000 100000")  # the root of a container has a quota too
    assert cpu.cpu_quota() == 0.1
    cgroups("job/step", "nonsense")
    assert cpu.cpu_quota() == 0.1


def test_without_linux_all_cores_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(cpu, "OWN_CGROUP", cpu.Path("/nothing/here"))
    assert cpu.usable_cores() == os.cpu_count()
