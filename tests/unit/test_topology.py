"""What is refused before any rank joins, and how the all-reduce is chosen."""

from __future__ import annotations

import pytest

from adapter import topology
from adapter.launchers import Launch
from adapter.topology import check_world, choose_all_reduce
from policies.errors import UserError


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
