"""How ranks of several hosts learn each other's addresses, and hear of each other then."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from types import SimpleNamespace

import psutil
import pytest
import torch
from test_hosts import HERE, THERE, addresses, job

from adapter.health import heartbeat
from adapter.health.heartbeat import meet
from adapter.health.watchdog import _distinct, describe
from adapter.parallel.group import CARD_BYTES, exchange
from adapter.parallel.progress import ALL_REDUCE, BROADCAST, Standing, hash_of_boot


@pytest.mark.parametrize("interface", ["lo", "lo,eth0"])
def test_own_address_is_that_of_gloos_interface(monkeypatch, interface):
    assert addresses(monkeypatch, "192.0.2.1", interface) == "127.0.0.1"


@pytest.mark.parametrize("interface", [None, "", "none7", "none7,lo"])
def test_own_address_is_that_of_the_way_to_the_master(monkeypatch, interface):
    assert addresses(monkeypatch, "127.0.0.1", interface) == "127.0.0.1"


def test_an_address_of_the_link_alone_is_not_taken(monkeypatch):
    link = [SimpleNamespace(family=family, address=address) for family, address in [
        (socket.AF_PACKET, "00:00"), (socket.AF_INET6, "fe80::1%eth9"), (socket.AF_INET, "169.254.0.1")]]
    own = SimpleNamespace(family=socket.AF_INET6, address="fd00::2")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth9": [*link, own]})
    assert addresses(monkeypatch, "127.0.0.1", "eth9") == "fd00::2"
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth9": link})
    assert addresses(monkeypatch, "127.0.0.1", "eth9") == "127.0.0.1"


@dataclass
class World:
    """The ranks of a job as threads: of adapter.parallel.parallel_state.Group what `meet` uses."""

    rank: int
    size: int
    table: list = field(default_factory=list)
    barrier: threading.Barrier | None = None

    def all_gather_last(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
        assert sizes == (len(x),) * self.size
        self.table[self.rank] = x
        self.barrier.wait(20)
        return torch.cat(self.table)


def in_a_world(size, do):
    """do(world) of every rank, at once; their results."""
    table, barrier, results = [None] * size, threading.Barrier(size), [None] * size

    def work(rank):
        results[rank] = do(World(rank, size, table, barrier))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def test_cards_reach_every_rank():
    cards = in_a_world(3, lambda world: exchange(world, {"rank": world.rank, "name": "ü" * 64}))
    assert cards == [[{"rank": r, "name": "ü" * 64} for r in range(3)]] * 3
    with pytest.raises(AssertionError):
        exchange(World(0, 1), {"name": "x" * CARD_BYTES})


def test_ranks_meet_those_of_other_hosts_and_hear_them(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    names = ["alpha", "beta", "alpha"]
    met = in_a_world(3, lambda world: meet(world, names, names[world.rank]))
    with closing(met[0]), closing(met[1]), closing(met[2]):
        assert [sorted(rank.distant) for rank in met] == [[1], [0, 2], [1]]
        assert met[0].look(HERE) is met[1].look(THERE) is None
        assert met[1].distant[0].standing == HERE
        assert met[2].look(HERE) is met[0].look(HERE) is None
        assert met[2].distant[1].standing == THERE
        assert len({rank._secret for rank in met}) == 3


def test_a_rank_without_a_line_says_why_and_is_not_waited_for(monkeypatch, caplog):
    opened, lock = heartbeat._open_line, threading.Lock()
    without = []

    def open_line():
        with lock:
            if not without:
                without.append(threading.current_thread())
                monkeypatch.setenv("MASTER_ADDR", "256.0.0.1")
                monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
                try:
                    return opened()
                finally:
                    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
            return opened()

    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(heartbeat, "_open_line", open_line)
    names = ["alpha", "beta", "gamma"]
    met = in_a_world(3, lambda world: meet(world, names, names[world.rank]))
    assert "another host that vanishes will not be noticed" in caplog.text
    missing = met.index(None)
    for rank, view in enumerate(met):
        if view is not None:
            assert sorted(view.distant) == sorted({0, 1, 2} - {rank, missing})
            view.close()


def test_hosts_of_one_name_are_told_apart():
    cards = [{"host": 1, "name": "a"}, {"host": 2, "name": "b"}, {"host": 3, "name": "a"}, {"host": 3, "name": "a"},
             {"host": 1, "name": "a"}]
    assert _distinct(cards) == ["a of rank 0", "b", "a of rank 2", "a of rank 2", "a of rank 0"]
    assert _distinct([{"host": 1, "name": "a"}] * 3) == ["a"] * 3
    assert hash_of_boot() == hash_of_boot()


@pytest.mark.parametrize("late, root, preparing", [(0, 0, True), (4, 4, True), (4, 0, False), (0, 4, False)])
def test_the_rank_that_prepares_requests_is_its_replicas_first(late, root, preparing):
    waiting, away = Standing(9, True, BROADCAST, 1), Standing(8, False, ALL_REDUCE, 224)
    said = describe(waiting, {late: away}, {late: f"rank {late} (host beta)"}, 7.2, root)
    assert said.startswith(f"rank {late} (host beta) has been ")
    assert ("preparing requests" in said) == preparing and "collective 9 (broadcast of 1 values)" in said


def test_a_process_that_is_killed_and_one_that_is_stopped_are_heard_of_no_more(monkeypatch):
    """The real clock, hastened: another process speaks, is stopped, goes on, is killed."""
    monkeypatch.setattr(heartbeat, "PULSE_S", 0.01)
    monkeypatch.setattr(heartbeat, "SILENT_S", 0.3)
    here, there = job(["alpha", "beta"])

    def first_words():
        until = time.monotonic() + 20
        while time.monotonic() < until:
            if said := here.look(HERE):
                return said
            if here.distant[1].standing:
                here.distant[1].standing = None
                return "heard"
            time.sleep(0.005)
        return None

    other = os.fork()
    if not other:
        signal.alarm(60)
        while True:
            there.look(THERE)
            time.sleep(0.005)
    try:
        assert first_words() == "heard"
        os.kill(other, signal.SIGSTOP)
        while (said := first_words()) == "heard":  # what was under way
            pass
        assert said.startswith("host beta (127.0.0.2, rank 1) has not been heard of")
        os.kill(other, signal.SIGCONT)
        until = time.monotonic() + 20
        while (said := first_words()) != "heard" and time.monotonic() < until:
            time.sleep(0.005)
        assert said == "heard"
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    while (said := first_words()) == "heard":
        pass
    assert said.startswith("host beta")
    here.close()
    there.close()
