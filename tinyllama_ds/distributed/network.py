"""Which way packets take from here, and where others may knock."""

import hashlib
import hmac
import secrets
import socket
from ipaddress import ip_address

import psutil

_ANYWHERE = "192.0.2.1"  # of no network (RFC 5737), so that the default route leads there
_PORTS = range(20_000, 30_000)  # below the kernel's ephemeral ports


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


def proof(key: bytes, *parts: object) -> str:
    """What shows somebody who has the same key that these words come from one who has it, without telling the key."""
    return hmac.new(key, repr(parts).encode(), hashlib.sha256).hexdigest()


def is_proof(shown: object, key: bytes, *parts: object) -> bool:
    """Whether that is what was shown."""
    return isinstance(shown, str) and hmac.compare_digest(shown.encode(), proof(key, *parts).encode())


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


def interface_towards(host: str, *, may_be_loopback: bool) -> str | None:
    """The network interface that leads to a host; None where there is none.

    Debian gives a host's own name to 127.0.1.1, so that on the host itself the way is the loopback. Where the other
    ranks could not be reached by that, it is the interface of the default route, else one that is up and has IPv4.
    """
    address = local_address_towards(host)
    if may_be_loopback or address is None or not is_loopback(address):
        return interface_of(address)
    by_default = local_address_towards(_ANYWHERE)
    return interface_of(by_default) if by_default is not None else _first_interface()


def is_loopback(address: str) -> bool:
    """Whether an address reaches this machine alone."""
    return ip_address(address.split("%")[0]).is_loopback


def _first_interface() -> str | None:
    up = [name for name, found in psutil.net_if_stats().items() if found.isup]
    for name, addresses in psutil.net_if_addrs().items():
        here = [found.address for found in addresses if found.family == socket.AF_INET]
        if name in up and here and not is_loopback(here[0]):
            return name
    return None
