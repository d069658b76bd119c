"""Are the other hosts of a job still there? Datagrams between ranks of different hosts, twice a second, tell.

A host that loses power or its network closes no connection: collectives would wait for minutes. Here it is missed after
`SILENT_S`, by name; a rank that ends because another died says so to the other hosts first. Each datagram begins with a
secret that its receiver handed out through the process group, and others are dropped.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from adapter.parallel import network
from adapter.parallel.group import Group, exchange
from adapter.parallel.progress import Standing
from policies.errors import UserError

log = logging.getLogger("adapter")
PULSE_S = 0.5
SILENT_S = 8.0  # a host of which no rank has been heard for so long is gone
UNHEARD_S = 20.0  # a host that was never heard is not judged (UDP may be blocked), but named after so long
SECRET_BYTES = 16
PULSE = struct.Struct(">i?3q")  # rank, and its Standing
MOST_HEARD = 10_000  # datagrams in one look, so that no flood and no broken socket keeps it for ever
LONGEST = 1000  # bytes of a farewell: one datagram, whole


@dataclass
class Distant:
    """A rank of another host. standing: what it said last; None: it was never heard."""

    host: str
    address: tuple[str, int]
    secret: bytes
    standing: Standing | None = None


@dataclass
class Silence:
    """Seconds since any rank of a host was heard, counted while this process ran."""

    seconds: float = 0.0
    heard: bool = False
    told: bool = False


class Hosts:
    """This rank's view of the other hosts. `look` must be called several times a second."""

    def __init__(self, rank: int, line: socket.socket, secret: bytes, distant: Mapping[int, Distant]) -> None:
        self.rank, self.distant = rank, distant
        self._line, self._secret = line, secret
        self._silences = {d.host: Silence() for d in distant.values()}
        self._looked, self._said = time.monotonic(), 0.0

    def look(self, mine: Standing) -> str | None:
        """Say that this rank lives, hear the others. A sentence where one took its leave or a host is silent."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * PULSE_S), now  # a process that was stopped heard nothing
        if now - self._said >= PULSE_S:
            self._send(mine, "")
            self._said = now
        for silence in self._silences.values():
            silence.seconds += passed
        return self._hear() or self._missed()

    def farewell(self, message: str) -> None:
        """Tell the ranks of other hosts why this one ends; three times, since datagrams may be lost."""
        for _ in range(3):
            self._send(Standing(0, False, 0, 0), message)

    def close(self) -> None:
        self._line.close()

    def _send(self, mine: Standing, message: str) -> None:
        pulse = PULSE.pack(self.rank, mine.inside, mine.entered, mine.kind, mine.values)
        pulse += message.encode(errors="replace")[:LONGEST]
        for rank in self.distant.values():
            with suppress(OSError):  # an unreachable host is found by its silence
                self._line.sendto(rank.secret + pulse, rank.address)

    def _hear(self) -> str | None:
        for _ in range(MOST_HEARD):
            try:
                data = self._line.recv(2048)
            except BlockingIOError:
                return None
            except OSError:  # the echo of a datagram to a port that is closed by now
                continue
            if len(data) < SECRET_BYTES + PULSE.size or not hmac.compare_digest(data[:SECRET_BYTES], self._secret):
                continue
            rank, inside, entered, kind, values = PULSE.unpack_from(data, SECRET_BYTES)
            if (other := self.distant.get(rank)) is None:
                continue
            if message := data[SECRET_BYTES + PULSE.size:].decode(errors="replace"):
                return f"host {other.host}: {message}"
            other.standing = Standing(entered, inside, kind, values)
            self._silences[other.host] = Silence(heard=True)
        return None

    def _missed(self) -> str | None:
        for host, silence in self._silences.items():
            ranks = [r for r, d in self.distant.items() if d.host == host]
            where = f"host {host} ({self.distant[ranks[0]].address[0]}, rank {', '.join(map(str, ranks))})"
            if silence.heard and silence.seconds > SILENT_S:
                return (f"{where} has not been heard of for {SILENT_S:.0f} s: it is down, cut off from here, or all "
                        "its ranks were killed")
            if not silence.heard and not silence.told and silence.seconds > UNHEARD_S:
                silence.told = True
                log.warning("%s: no datagram came from it; if UDP is blocked between the hosts, one that vanishes is "
                            "noticed by the time limit of the collectives only", where)
        return None


def meet(world: Group, names: Sequence[str], mine: str) -> Hosts | None:
    """Open a line to the ranks of other hosts; every rank of the job must call it. None: it has none, and says why.

    names: every rank's host; mine: this rank's.
    """
    line, secret = _open_line(), secrets.token_bytes(SECRET_BYTES)
    address = line.getsockname()[:2] if line else None
    cards = exchange(world, {"address": address, "secret": secret.hex()})
    distant = {r: Distant(names[r], (card["address"][0], card["address"][1]), bytes.fromhex(card["secret"]))
               for r, card in enumerate(cards) if names[r] != mine and card["address"]}
    return Hosts(world.rank, line, secret, distant) if line else None


def _open_line() -> socket.socket | None:
    try:
        address = _own_address()
        line = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        line.setblocking(False)
        line.bind((address, 0))
    except OSError as error:
        log.warning("another host that vanishes will not be noticed before the collectives' time limit: %s", error)
        return None
    return line


def _own_address() -> str:
    """This host's address on the network that the ranks talk over: that of gloo's interface, or of the way to the
    master. Raises OSError where there is none."""
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    for name, address in network.interfaces():
        if name == wanted and not ipaddress.ip_address(address).is_link_local:
            return address
    try:
        return network.own_address_towards(os.environ["MASTER_ADDR"])
    except UserError as error:
        raise OSError(str(error)) from None
