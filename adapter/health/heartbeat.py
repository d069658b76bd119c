"""A heartbeat between the hosts of a job: datagrams between ranks of different hosts, twice a second.

A host that loses power or its network closes no connection, and collectives would wait for minutes. Here it is reported
by name after `heartbeat_s` seconds of silence (tensor_parallel.heartbeat_s); a rank that ends because another died
reports it to the other hosts first. Each datagram begins with a secret that its receiver handed out through the process
group; others are dropped.

A pause of the receiver is no silence of the others. One of the sender (a migrated virtual machine, swapping) is: what
it sends afterwards is heard before it is judged, and a warning after WARN_S names the key to raise.
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
from adapter.parallel.progress import CollectiveState
from policies.errors import UserError

log = logging.getLogger("adapter")
PULSE_S = 0.5
HEARTBEAT_S = 30.0  # where the caller names no other limit
WARN_S = 8.0  # a host of which no rank has been heard for so long is named
UNHEARD_S = 20.0  # a host that was never heard is not judged (UDP may be blocked), but named after so long
SECRET_BYTES = 16
PULSE = struct.Struct(">i?3q")  # rank, and its CollectiveState
MOST_HEARD = 10_000  # datagrams in one look, so that no flood and no broken socket keeps it for ever
LONGEST = 1000  # bytes of a farewell: one datagram, whole


@dataclass
class Distant:
    """A rank of another host. state: the last that it sent; None: it was never heard."""

    host: str
    address: tuple[str, int]
    secret: bytes
    state: CollectiveState | None = None


@dataclass
class Silence:
    """Seconds since any rank of a host was heard, counted while this process ran."""

    seconds: float = 0.0
    heard: bool = False
    reported: bool = False


class Hosts:
    """This rank's view of the other hosts. `look` must be called several times a second.

    heartbeat_s: seconds of silence after which a host is gone; 0: none is.
    """

    def __init__(self, rank: int, line: socket.socket, secret: bytes, distant: Mapping[int, Distant],
                 heartbeat_s: float = HEARTBEAT_S) -> None:
        self.rank, self.distant, self.heartbeat_s = rank, distant, heartbeat_s
        self._line, self._secret = line, secret
        self._silences = {d.host: Silence() for d in distant.values()}
        self._looked, self._sent = time.monotonic(), 0.0

    def look(self, mine: CollectiveState) -> str | None:
        """Send that this rank lives and receive from the others. A sentence where one ended or a host is silent."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * PULSE_S), now  # a process that was stopped heard nothing
        if now - self._sent >= PULSE_S:
            self._send(mine, "")
            self._sent = now
        for silence in self._silences.values():
            silence.seconds += passed
        return self._hear() or self._missed()

    def farewell(self, message: str) -> None:
        """Send the ranks of other hosts why this one ends; three times, since datagrams may be lost."""
        for _ in range(3):
            self._send(CollectiveState(0, False, 0, 0), message)

    def close(self) -> None:
        self._line.close()

    def _send(self, mine: CollectiveState, message: str) -> None:
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
            other.state = CollectiveState(entered, inside, kind, values)
            self._silences[other.host] = Silence(heard=True)
        return None

    def _missed(self) -> str | None:
        """A sentence where a host is silent for longer than it may be; warnings before that."""
        for host, silence in self._silences.items():
            if silence.heard and 0 < self.heartbeat_s < silence.seconds:
                return (f"{self._name(host)} has not been heard of for {self.heartbeat_s:.0f} s "
                        "(tensor_parallel.heartbeat_s): it is down, cut off from here, or all its ranks were killed")
            if silence.reported or silence.seconds <= (WARN_S if silence.heard else UNHEARD_S):
                continue
            silence.reported = True
            if silence.heard:
                after = f"ends after {self.heartbeat_s:.0f} s" if self.heartbeat_s else "does not end for that"
                log.warning("%s has not been heard of for %.0f s; the job %s (tensor_parallel.heartbeat_s)",
                            self._name(host), silence.seconds, after)
            else:
                log.warning("%s: no datagram came from it; if UDP is blocked between the hosts, one that vanishes is "
                            "noticed by the time limit of the collectives only", self._name(host))
        return None

    def _name(self, host: str) -> str:
        ranks = [r for r, d in self.distant.items() if d.host == host]
        return f"host {host} ({self.distant[ranks[0]].address[0]}, rank {', '.join(map(str, ranks))})"


def meet(world: Group, names: Sequence[str], mine: str, heartbeat_s: float = HEARTBEAT_S) -> Hosts | None:
    """Open a line to the ranks of other hosts; every rank of the job must call it. None, with a warning: it has none.

    names: every rank's host; mine: this rank's; heartbeat_s: as Hosts'.
    """
    line, secret = _open_line(), secrets.token_bytes(SECRET_BYTES)
    address = line.getsockname()[:2] if line else None
    every = exchange(world, {"address": address, "secret": secret.hex()})
    distant = {r: Distant(names[r], (facts["address"][0], facts["address"][1]), bytes.fromhex(facts["secret"]))
               for r, facts in enumerate(every) if names[r] != mine and facts["address"]}
    return Hosts(world.rank, line, secret, distant, heartbeat_s) if line else None


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
