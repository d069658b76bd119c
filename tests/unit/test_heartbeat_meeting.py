"""How ranks of several hosts meet, and what they call each other; ranks are threads."""

from __future__ import annotations

import socket
import threading
from contextlib import closing
from types import SimpleNamespace

import psutil
import pytest
from threads import in_ranks

from adapter.health import heartbeat
from adapter.health.heartbeat import meet
from adapter.health.watchdog import _distinct, describe
from adapter.parallel.progress import ALL_GATHER, ALL_REDUCE, BROADCAST, CollectiveState, hash_of_boot

HERE, THERE = CollectiveState(3, True, ALL_GATHER, 12), CollectiveState(-4, False, ALL_REDUCE, 2**40)


def addresses(monkeypatch, master, interface=None):
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("MASTER_ADDR", master)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if interface is not None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    return heartbeat._own_address()


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


def test_ranks_meet_those_of_other_hosts_and_hear_them(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    names = ["alpha", "beta", "alpha"]
    met = in_ranks(3, lambda world: meet(world, names, names[world.rank]))[0]
    with closing(met[0]), closing(met[1]), closing(met[2]):
        assert [sorted(rank.distant) for rank in met] == [[1], [0, 2], [1]]
        assert met[0].look(HERE) is met[1].look(THERE) is None
        assert met[1].distant[0].state == HERE
        assert met[2].look(HERE) is met[0].look(HERE) is None
        assert met[2].distant[1].state == THERE
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
    met = in_ranks(3, lambda world: meet(world, names, names[world.rank]))[0]
    assert "another host that vanishes will not be noticed" in caplog.text
    missing = met.index(None)
    for rank, view in enumerate(met):
        if view is not None:
            assert sorted(view.distant) == sorted({0, 1, 2} - {rank, missing})
            view.close()


def test_hosts_of_one_name_get_their_first_rank_to_it():
    facts = [{"host": 1, "name": "a"}, {"host": 2, "name": "b"}, {"host": 3, "name": "a"}, {"host": 3, "name": "a"},
             {"host": 1, "name": "a"}]
    assert _distinct(facts) == ["a of rank 0", "b", "a of rank 2", "a of rank 2", "a of rank 0"]
    assert _distinct([{"host": 1, "name": "a"}] * 3) == ["a"] * 3
    assert hash_of_boot() == hash_of_boot()


@pytest.mark.parametrize("late, root, preparing", [(0, 0, True), (4, 4, True), (4, 0, False), (0, 4, False)])
def test_the_rank_that_prepares_requests_is_its_replicas_first(late, root, preparing):
    waiting, away = CollectiveState(9, True, BROADCAST, 1), CollectiveState(8, False, ALL_REDUCE, 224)
    reported = describe(waiting, {late: away}, {late: f"rank {late} (host beta)"}, 7.2, root)
    assert reported.startswith(f"rank {late} (host beta) has been ")
    assert ("preparing requests" in reported) == preparing and "collective 9 (broadcast of 1 values)" in reported


def test_the_line_to_a_master_of_ipv6(monkeypatch):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(str(error))
    assert addresses(monkeypatch, "::1") == "::1"
    opened = heartbeat._open_line()
    assert opened.family == socket.AF_INET6 and opened.getsockname()[0] == "::1" and not opened.getblocking()
    opened.close()
