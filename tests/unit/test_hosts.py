"""Hosts that watch each other: real datagrams between addresses of this one, and a clock that the tests turn."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter.health import heartbeat
from adapter.health.heartbeat import LONGEST, PULSE, SECRET_BYTES, Distant, Hosts, meet
from adapter.health.watchdog import _distinct, describe
from adapter.parallel.group import CARD_BYTES, exchange
from adapter.parallel.progress import ALL_GATHER, ALL_REDUCE, BROADCAST, Standing, hash_of_boot

HERE, THERE = Standing(3, True, ALL_GATHER, 12), Standing(-4, False, ALL_REDUCE, 2**40)


class Clock:
    """Time as adapter.health.heartbeat sees it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    turned = Clock()
    monkeypatch.setattr(heartbeat, "time", turned)
    return turned


def line(address="127.0.0.1"):
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    made.setblocking(False)
    made.bind((address, 0))
    return made


def job(names: Sequence[str], addresses: Sequence[str] | None = None) -> list[Hosts]:
    """A rank's view for each of `names`, which are the ranks' hosts."""
    addresses = addresses or [f"127.0.0.{1 + sorted(set(names)).index(name)}" for name in names]
    lines, words = [line(address) for address in addresses], [secrets.token_bytes(SECRET_BYTES) for _ in names]
    ends = [made.getsockname()[:2] for made in lines]
    return [Hosts(rank, lines[rank], words[rank], {r: Distant(names[r], ends[r], words[r]) for r in range(len(names))
                                                   if names[r] != name}) for rank, name in enumerate(names)]


@pytest.fixture
def ranks(request, clock):
    """Two ranks on alpha (0 and 2), one on beta (1), one on gamma (3)."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(rank)) for rank in job(["alpha", "beta", "alpha", "gamma"])]


def pass_seconds(clock, seconds, listener, *speakers):
    """Every quarter of a second the speakers speak and the listener looks; what it says first, and when."""
    began = clock.now
    while clock.now < began + seconds:
        clock.now += 0.25
        for speaker in speakers:
            speaker._send(HERE, "")
        if said := listener.look(HERE):
            return said, clock.now - began
    return None


def test_standings_are_heard_by_the_ranks_of_other_hosts(ranks):
    assert ranks[0].look(HERE) is None and ranks[1].look(THERE) is None
    assert ranks[0].look(HERE) is None
    assert ranks[1].distant[0].standing == HERE and ranks[0].distant[1].standing == THERE
    assert ranks[0].distant[3].standing is None
    assert sorted(ranks[0].distant) == [1, 3] and sorted(ranks[1].distant) == [0, 2, 3]


def test_a_rank_speaks_twice_a_second(ranks, clock):
    for step in range(20):
        assert ranks[0].look(Standing(step, False, 0, 0)) is None
        clock.now += 0.125
    heard = []
    while True:
        try:
            heard.append(PULSE.unpack_from(ranks[1]._line.recv(2048), SECRET_BYTES)[2])
        except BlockingIOError:
            break
    assert heard == [0, 4, 8, 12, 16]


def test_a_silent_host_is_named_with_its_address_and_ranks(ranks, clock):
    assert pass_seconds(clock, 30, ranks[1], ranks[0], ranks[2], ranks[3]) is None
    said, after = pass_seconds(clock, 30, ranks[1], ranks[3])
    assert said.startswith("host alpha (127.0.0.1, rank 0, 2) has not been heard of for 8 s")
    assert 8 <= after < 9


def test_a_silent_rank_of_a_host_that_speaks_is_not_its_hosts_end(ranks, clock):
    assert pass_seconds(clock, 3, ranks[1], ranks[0], ranks[2], ranks[3]) is None
    assert pass_seconds(clock, 60, ranks[1], ranks[2], ranks[3]) is None


def test_a_stop_of_this_process_ends_nobody(ranks, clock):
    everyone = ranks[1], ranks[0], ranks[2], ranks[3]
    assert pass_seconds(clock, 3, *everyone) is None
    for _ in range(3):
        clock.now += 60
        assert ranks[1].look(HERE) is None, "nothing is in its buffer, and yet nobody is gone"
        assert pass_seconds(clock, 3, *everyone) is None


def test_a_host_that_was_never_heard_is_named_once_and_ends_nothing(ranks, clock, caplog):
    caplog.set_level(logging.WARNING, "adapter")
    assert pass_seconds(clock, 19, ranks[1], ranks[0]) is None and not caplog.records
    assert pass_seconds(clock, 300, ranks[1], ranks[0]) is None
    (record,) = caplog.records
    assert record.getMessage().startswith("host gamma (127.0.0.3, rank 3): no datagram came from it; if UDP")


@pytest.mark.parametrize("message", ["rank 1 failed: KeyError: 'x'", "no such file: ünï", "x" * 5000, "x" + "ü" * 5000])
def test_a_farewell_is_heard_with_the_name_of_its_host(ranks, message):
    ranks[1].farewell(message)
    for rank in (ranks[0], ranks[2], ranks[3]):
        said = rank.look(HERE)
        assert said.startswith("host beta: " + message[:LONGEST // 2]) and len(said) < LONGEST + 20


def test_a_farewell_of_any_text_is_sent(ranks):
    ranks[1].farewell("no such file: \udcff")
    assert ranks[0].look(HERE) == "host beta: no such file: ?"


def test_two_of_three_farewells_may_be_lost(ranks):
    ranks[1].farewell("gone")
    for _ in range(2):
        ranks[0]._line.recv(2048)
    assert ranks[0].look(HERE) == "host beta: gone"


def send(to, *data):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for one in data:
            stranger.sendto(one, to._line.getsockname())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.integers(0, SECRET_BYTES), st.integers(-2**31, 2**31 - 1))
def test_datagrams_of_others_are_dropped(noise, known, number):
    """Noise, the secret or a part of it and noise, a rank that is not of another host, a wrong secret."""
    rank, other = job(["alpha", "beta"])
    with closing(rank), closing(other):
        pulse = PULSE.pack(1, True, 9, 9, 9)
        wrong = bytes([rank._secret[0] ^ 1]) + rank._secret[1:]
        send(rank, noise, rank._secret[:known] + noise[:PULSE.size - 1], wrong + pulse, wrong + pulse + b"gone", b"",
             noise + bytes(60_000), other._secret + pulse)
        if number != 1:
            send(rank, rank._secret + PULSE.pack(number, True, 9, 9, 9) + noise)
        assert rank.look(HERE) is None
        assert rank.distant[1].standing is None and not rank._silences["beta"].heard
        send(rank, rank._secret + pulse)
        assert rank.look(HERE) is None and rank.distant[1].standing == Standing(9, True, 9, 9)


@pytest.fixture
def alarm():
    """No look may take seconds."""
    def ring(*_):
        pytest.fail("it does not return")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_port_that_is_closed_by_now_is_silence(ranks, clock, alarm):
    """With IP_RECVERR the system tells every echo, which it otherwise may or may not."""
    ranks[1]._line.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_RECVERR", 11), 1)
    assert pass_seconds(clock, 3, ranks[1], ranks[0], ranks[2], ranks[3]) is None
    ranks[3].close()
    ranks[1]._send(HERE, "")
    with pytest.raises(ConnectionRefusedError):
        ranks[1]._line.recv(2048)
    ranks[1].farewell("x")
    said, _ = pass_seconds(clock, 30, ranks[1], ranks[0], ranks[2])
    assert said.startswith("host gamma")


def test_a_broken_socket_keeps_no_look_for_ever(ranks, clock, alarm):
    ranks[1].close()
    assert ranks[1].look(HERE) is None


def test_a_flood_keeps_no_look_for_ever(ranks, monkeypatch):
    monkeypatch.setattr(heartbeat, "MOST_HEARD", 3)
    for step in range(5):
        ranks[0]._send(Standing(step, False, 0, 0), "")
    for last in (2, 4):
        assert ranks[1].look(HERE) is None and ranks[1].distant[0].standing.entered == last


def test_ipv6(clock):
    try:
        pair = job(["alpha", "beta"], ["::1", "::1"])
    except OSError as error:
        pytest.skip(str(error))
    with closing(pair[0]), closing(pair[1]):
        assert pass_seconds(clock, 2, *pair) is None and pair[0].distant[1].standing == HERE
        said, _ = pass_seconds(clock, 30, pair[0])
        assert said.startswith("host beta (::1, rank 1) has not been heard")


def test_the_line_to_a_master_of_ipv6(monkeypatch):
    try:
        line("::1").close()
    except OSError as error:
        pytest.skip(str(error))
    assert addresses(monkeypatch, "::1") == "::1"
    opened = heartbeat._open_line()
    assert opened.family == socket.AF_INET6 and opened.getsockname()[0] == "::1" and not opened.getblocking()
    opened.close()


def test_addresses_of_another_family_are_silence_and_no_error(clock):
    pair = job(["alpha", "beta"])
    pair[0].distant[1].address = ("::1", 9)
    with closing(pair[0]), closing(pair[1]):
        assert pass_seconds(clock, 2, pair[0]) is None


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
