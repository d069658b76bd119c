"""Launchers' environments, and what is refused before any rank joins."""

from __future__ import annotations

import pytest

from adapter import topology
from adapter.launchers import Launch, read_environment
from adapter.topology import check_world, choose_all_reduce
from policies.errors import UserError

RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_deepspeed_launcher():
    assert read_environment({**RANK, "LOCAL_SIZE": "2"}) == Launch(1, 2, 1, 2)


def test_torchrun_gets_the_local_size_that_the_shared_memory_op_needs():
    environ = {**RANK, "LOCAL_WORLD_SIZE": "2"}
    assert read_environment(environ) == Launch(1, 2, 1, 2)
    assert environ["LOCAL_SIZE"] == "2"


def test_a_job_of_one_host_stays_on_loopback_and_one_of_two_does_not():
    for local, expected in (("2", "lo"), ("1", None)):
        environ = {**RANK, "LOCAL_SIZE": local}
        read_environment(environ)
        assert environ.get("GLOO_SOCKET_IFNAME") == expected


def test_no_launcher_is_one_rank():
    environ: dict[str, str] = {}
    assert read_environment(environ) == Launch(0, 1, 0, 1)
    assert environ["MASTER_ADDR"] == "127.0.0.1"


def test_incomplete_environment():
    with pytest.raises(UserError, match="WORLD_SIZE"):
        read_environment({"RANK": "0"})


@pytest.mark.parametrize("world, tp, words", [
    (1, 4, "1 rank,.*--num_accelerators 4.*one of 1$"), (4, 3, "4 ranks.*whole replicas.*one of 1, 2, 4$"),
    (2, 3, "2 ranks.*tp_size is 3"),
])
def test_world_that_makes_no_whole_replicas(world, tp, words):
    with pytest.raises(UserError, match=words):
        check_world(world, tp)
    check_world(tp, tp)
    check_world(3 * tp, tp)


@pytest.mark.parametrize("launch, tp, cores, op, fast, why", [
    (Launch(0, 2, 0, 2), 2, 4, True, True, "shared-memory op"),
    (Launch(0, 4, 0, 4), 4, 2, True, False, "4 ranks on 2 cores"),
    (Launch(0, 4, 0, 2), 4, 8, True, False, "one host"),
    (Launch(0, 4, 0, 4), 2, 8, True, False, "one replica"),
    (Launch(0, 2, 0, 0), 2, 8, True, False, "LOCAL_SIZE not set"),
    (Launch(0, 2, 0, 2), 2, 4, False, False, "compiler"),
])
def test_all_reduce_is_chosen_with_its_reason(monkeypatch, launch, tp, cores, op, fast, why):
    monkeypatch.setattr(topology, "usable_cores", lambda: cores)
    backend = type("Backend", (), {"shm_comm_op": object() if op else None})()
    monkeypatch.setattr(topology.dist.comm, "cdb", backend)
    chosen, reason = choose_all_reduce(launch, tp)
    assert chosen is fast and why in reason
