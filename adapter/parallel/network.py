"""This host's addresses and interfaces: which of them lead to the other hosts of a job.

psutil is imported where it is used, since adapter.doctor runs where packages are missing, and imports this module.
"""

from __future__ import annotations

import socket

from policies.errors import UserError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
NOBODY = "192.0.2.1"  # reserved for documentation, so that packets to it would take the default route


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def interface_to(address: str) -> str | None:
    """Name of the interface that leads to `address`; None where the way there has none with a name.

    Raises UserError where `address` cannot be resolved or reached, or is loopback and it cannot be known what else.
    """
    source = own_address_towards(address)
    if _is_loopback(source):  # rank 0's host, whose /etc/hosts has its name on a loopback address
        return _only_interface(f"MASTER_ADDR {address} is loopback on host {socket.gethostname()} (see /etc/hosts)")[0]
    return next((name for name, own in interfaces() if own == source), None)


def is_own(address: str) -> bool:
    """Whether this host has `address`; a name counts if it resolves to one that it has. UserError: as interface_to."""
    resolved = _resolve(address)[1][0]
    return _is_loopback(resolved) or any(own == resolved for _, own in interfaces())


def own_address() -> str:
    """An address of this host that other hosts can reach: its name's, or if that is loopback, the one on the way out.

    Raises UserError where neither is one.
    """
    try:
        address = socket.gethostbyname(socket.gethostname())
        if not _is_loopback(address):
            return address
    except OSError:
        pass
    try:
        return own_address_towards(NOBODY)
    except UserError:  # no default route
        return _only_interface(f"the name of host {socket.gethostname()} is no address that others can reach")[1]


def _resolve(address: str) -> tuple[int, tuple]:
    """Address family, and the address as sockets take it."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    except OSError as error:
        raise UserError(f"MASTER_ADDR {address} cannot be resolved on host {socket.gethostname()} ({error.strerror}). "
                        "Use a name that every host knows, or an IP address") from None
    return family, target


def own_address_towards(address: str) -> str:
    """This host's own address for packets to `address`. None is sent."""
    family, target = _resolve(address)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(target)
        except OSError as error:
            raise UserError(f"host {socket.gethostname()} has no route to MASTER_ADDR {address} ({error.strerror}). "
                            "Use an address of the first host in a network that all hosts share") from None
        return _without_scope(probe.getsockname()[0])


def interfaces() -> list[tuple[str, str]]:
    """(interface, IP address) of this host."""
    import psutil

    return [(name, _without_scope(item.address)) for name, items in psutil.net_if_addrs().items() for item in items
            if item.family in (socket.AF_INET, socket.AF_INET6)]


def _without_scope(address: str) -> str:
    return address.partition("%")[0]


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _only_interface(why: str) -> tuple[str, str]:
    """The one interface that is up and not loopback, and its IPv4 address. Raises UserError where there are several."""
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = {name: own for name, own in interfaces()
             if name in up and ":" not in own and not own.startswith(("127.", "169.254."))}
    if len(found) != 1:
        raise UserError(f"{why}, and which of its interfaces ({', '.join(sorted(found)) or 'none is up'}) leads to the "
                        "other hosts cannot be known. Set MASTER_ADDR to an IP address that they reach")
    return next(iter(found.items()))
