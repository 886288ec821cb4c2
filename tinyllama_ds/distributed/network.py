"""Ports, addresses and network interfaces of this machine."""

import secrets
import socket
from ipaddress import ip_address

import psutil

_ANYWHERE = "192.0.2.1"  # not in any network (RFC 5737), so it is reached by the default route
_PORTS = range(20_000, 30_000)  # below the kernel's ephemeral ports


def free_port() -> int:
    """A TCP port without a listener, which no connection takes before the ranks do, many seconds later."""
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port


def local_address_towards(host: str) -> str | None:
    """This machine's address as a host would see it; None if its name is unknown or there is no route to it."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            return probe.getsockname()[0]
    except OSError:
        return None


def interface_of(address: str | None) -> str | None:
    """The network interface of this machine that has an address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.split("%")[0] == address for found in addresses):
            return name
    return None


def interface_towards(host: str, *, may_be_loopback: bool) -> str | None:
    """The network interface of the route to a host; None if there is none.

    Debian maps a host's own name to 127.0.1.1, so on the host itself the route is the loopback. If the other ranks
    cannot be reached by that, it is the interface of the default route, else one that is up and has IPv4.
    """
    address = local_address_towards(host)
    if may_be_loopback or address is None or not is_loopback(address):
        return interface_of(address)
    by_default = local_address_towards(_ANYWHERE)
    return interface_of(by_default) if by_default is not None else _first_interface()


def is_loopback(address: str) -> bool:
    """Whether an address reaches only this machine."""
    return ip_address(address.split("%")[0]).is_loopback


def _first_interface() -> str | None:
    up = [name for name, found in psutil.net_if_stats().items() if found.isup]
    for name, addresses in psutil.net_if_addrs().items():
        here = [found.address for found in addresses if found.family == socket.AF_INET]
        if name in up and here and not is_loopback(here[0]):
            return name
    return None
