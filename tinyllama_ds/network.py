"""Which way packets take from here, and where others may knock."""

import secrets
import socket

import psutil

_PORTS = range(20_000, 30_000)  # below those that a kernel gives to whoever connects


def free_port() -> int:
    """A TCP port that nobody listens on, and that no connection takes before the ranks do, many seconds later."""
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port


def local_address_towards(host: str) -> str | None:
    """This machine's address as a host would see it; None where its name is unknown or no way leads there."""
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
