"""Hosts that watch each other: real datagrams between addresses of this one, and a clock that the tests turn."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter.health import heartbeat
from adapter.health.heartbeat import LONGEST, PULSE, SECRET_BYTES, Distant, Hosts
from adapter.parallel.progress import ALL_GATHER, ALL_REDUCE, CollectiveState

HERE, THERE = CollectiveState(3, True, ALL_GATHER, 12), CollectiveState(-4, False, ALL_REDUCE, 2**40)


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
        if reported := listener.look(HERE):
            return reported, clock.now - began
    return None


def test_standings_are_heard_by_the_ranks_of_other_hosts(ranks):
    assert ranks[0].look(HERE) is None and ranks[1].look(THERE) is None
    assert ranks[0].look(HERE) is None
    assert ranks[1].distant[0].state == HERE and ranks[0].distant[1].state == THERE
    assert ranks[0].distant[3].state is None
    assert sorted(ranks[0].distant) == [1, 3] and sorted(ranks[1].distant) == [0, 2, 3]


def test_a_rank_speaks_twice_a_second(ranks, clock):
    for step in range(20):
        assert ranks[0].look(CollectiveState(step, False, 0, 0)) is None
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
    reported, after = pass_seconds(clock, 60, ranks[1], ranks[3])
    assert reported.startswith("host alpha (127.0.0.1, rank 0, 2) has not been heard of for 30 s")
    assert 30 <= after < 31


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
        reported = rank.look(HERE)
        assert reported.startswith("host beta: " + message[:LONGEST // 2]) and len(reported) < LONGEST + 20


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
        assert rank.distant[1].state is None and not rank._silences["beta"].heard
        send(rank, rank._secret + pulse)
        assert rank.look(HERE) is None and rank.distant[1].state == CollectiveState(9, True, 9, 9)


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
    reported, _ = pass_seconds(clock, 60, ranks[1], ranks[0], ranks[2])
    assert reported.startswith("host gamma")


def test_a_broken_socket_keeps_no_look_for_ever(ranks, clock, alarm):
    ranks[1].close()
    assert ranks[1].look(HERE) is None


def test_a_flood_keeps_no_look_for_ever(ranks, monkeypatch):
    monkeypatch.setattr(heartbeat, "MOST_HEARD", 3)
    for step in range(5):
        ranks[0]._send(CollectiveState(step, False, 0, 0), "")
    for last in (2, 4):
        assert ranks[1].look(HERE) is None and ranks[1].distant[0].state.entered == last


def test_ipv6(clock):
    try:
        pair = job(["alpha", "beta"], ["::1", "::1"])
    except OSError as error:
        pytest.skip(str(error))
    with closing(pair[0]), closing(pair[1]):
        assert pass_seconds(clock, 2, *pair) is None and pair[0].distant[1].state == HERE
        reported, _ = pass_seconds(clock, 60, pair[0])
        assert reported.startswith("host beta (::1, rank 1) has not been heard")


def test_addresses_of_another_family_are_silence_and_no_error(clock):
    pair = job(["alpha", "beta"])
    pair[0].distant[1].address = ("::1", 9)
    with closing(pair[0]), closing(pair[1]):
        assert pass_seconds(clock, 2, pair[0]) is None


@pytest.fixture
def other_process(monkeypatch):
    """This process's view of another one, and the number of that one, which sends heartbeats; the clock is hastened."""
    monkeypatch.setattr(heartbeat, "PULSE_S", 0.01)
    here, there = job(["alpha", "beta"])
    child = os.fork()
    if not child:
        signal.alarm(120)
        while True:
            there.look(THERE)
            time.sleep(0.005)
    yield here, child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    here.close()
    there.close()


def until(here, found, within_s=60):
    """What `here` reports, looking until found(that)."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        report = here.look(HERE)
        if found(report):
            return report
        time.sleep(0.005)
    raise AssertionError("it did not come to that")


def is_heard(here):
    heard, here.distant[1].state = here.distant[1].state, None
    return heard is not None


def test_a_pause_shorter_than_the_limit_is_a_warning_and_ends_nothing(other_process, monkeypatch, caplog):
    monkeypatch.setattr(heartbeat, "WARN_S", 0.2)
    here, child = other_process
    assert here.heartbeat_s == 30, "the default"
    until(here, lambda report: is_heard(here))
    for _ in range(2):
        caplog.clear()
        os.kill(child, signal.SIGSTOP)
        assert until(here, lambda report: report or caplog.records) is None
        assert "host beta (127.0.0.2, rank 1) has not been heard of for 0 s; the job ends after 30 s" in caplog.text
        is_heard(here)  # what came before the pause
        os.kill(child, signal.SIGCONT)
        assert until(here, lambda report: report or is_heard(here)) is None
        assert here._silences["beta"].seconds < 10


@pytest.mark.parametrize("ending", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_is_stopped_or_killed_for_longer_than_the_limit_is_named(other_process, ending):
    here, child = other_process
    here.heartbeat_s = 2
    until(here, lambda report: is_heard(here))
    os.kill(child, ending)
    report = until(here, lambda report: report)
    assert report.startswith("host beta (127.0.0.2, rank 1) has not been heard of for 2 s")
    os.kill(child, signal.SIGCONT)
    if ending == signal.SIGSTOP:
        until(here, lambda report: is_heard(here))


@pytest.mark.parametrize("heartbeat_s, ends", [(30, True), (3, True), (0, False)])
def test_the_limit_is_the_configs_and_0_is_none(ranks, clock, caplog, heartbeat_s, ends):
    ranks[1].heartbeat_s = heartbeat_s
    assert pass_seconds(clock, 3, ranks[1], ranks[0], ranks[2], ranks[3]) is None
    found = pass_seconds(clock, 300, ranks[1], ranks[3])
    assert (found is not None) == ends
    if ends:
        assert f"for {heartbeat_s} s (tensor_parallel.heartbeat_s)" in found[0] and found[1] - heartbeat_s < 1
    else:
        assert [r.getMessage() for r in caplog.records] == [
            "host alpha (127.0.0.1, rank 0, 2) has not been heard of for 8 s; the job does not end for that "
            "(tensor_parallel.heartbeat_s)"]
