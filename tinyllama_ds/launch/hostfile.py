"""The hostfile: `host slots=N` per line, read more strictly than DeepSpeed reads it.

A host becomes an argument of ssh and pdsh, so a line that either could take for an option or a list is refused here.
"""

import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from tinyllama_ds.errors import Refusal

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")  # RFC 1123
_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_FILTER = re.compile(r"([^\s:@]+)(?::(\d+(?:,\d+)*))?")


@dataclass(frozen=True)
class Host:
    """One machine, and which of its GPUs to use: all of its `slots`, unless `devices` names some."""

    name: str
    slots: int
    devices: tuple[int, ...] | None = None

    @property
    def ranks(self) -> int:
        """How many processes run there."""
        return self.slots if self.devices is None else len(self.devices)

    @property
    def takes_first(self) -> bool:
        """Whether its GPUs are number 0 and on, which is all that MPI and Slurm can be asked for."""
        return self.devices is None or self.devices == tuple(range(len(self.devices)))


def read_hostfile(path: Path) -> list[Host]:
    """All hosts in the order of the file; raises `Refusal` with the line number of anything that is not a host."""
    if not path.is_file():
        raise Refusal(f"{path}: the hostfile is missing; expected lines such as 'node1 slots=8'")
    hosts: dict[str, Host] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        content = line.strip()
        if not content or content.startswith("#"):
            continue
        match = _LINE.fullmatch(content)
        if match is None:
            raise Refusal(f"{path}:{number}: {content!r} is not of the form 'host slots=N'")
        name, slots = match[1], int(match[2])
        if not is_host(name):
            raise Refusal(f"{path}:{number}: {name!r} is neither a host name nor an IPv4 address")
        if slots < 1:
            raise Refusal(f"{path}:{number}: slots=0; expected the number of GPUs of {name}")
        if name in hosts:
            raise Refusal(f"{path}:{number}: {name} is listed twice; give each host one line with all its slots")
        hosts[name] = Host(name, slots)
    if not hosts:
        raise Refusal(f"{path}: names no host; expected lines such as 'node1 slots=8'")
    return list(hosts.values())


def filter_hosts(hosts: list[Host], include: str | None, exclude: str | None) -> list[Host]:
    """What `--include` or `--exclude` leaves, in DeepSpeed's grammar: `host1@host2:0,2`, a host alone being all of it.

    Raises `Refusal` for a host or slot that is not in the hostfile, and where nothing is left.
    """
    if include and exclude:
        raise Refusal("--include and --exclude were both given; expected one of them")
    text, option = (include, "--include") if include else (exclude, "--exclude")
    if not text:
        return hosts
    named = _read_filter(text, option, {host.name: host for host in hosts})
    chosen = []
    for host in hosts:
        of_host = named.get(host.name, set())
        left = of_host if include else set(range(host.slots)) - of_host
        if left:
            whole = len(left) == host.slots
            chosen.append(Host(host.name, host.slots, None if whole else tuple(sorted(left))))
    if not chosen:
        raise Refusal(f"{option} {text}: leaves no GPU of any host")
    return chosen


def write_filter(hosts: list[Host]) -> str:
    """The hosts as DeepSpeed's `--include`."""
    return "@".join(
        host.name if host.devices is None else f"{host.name}:{','.join(map(str, host.devices))}" for host in hosts
    )


def _read_filter(text: str, option: str, hosts: dict[str, Host]) -> dict[str, set[int]]:
    named: dict[str, set[int]] = {}
    for part in text.split("@"):
        match = _FILTER.fullmatch(part)
        if match is None:
            raise Refusal(f"{option} {text}: {part!r} is not of the form 'host' or 'host:0,2'; '@' separates hosts")
        name = match[1]
        if name not in hosts:
            raise Refusal(f"{option} {text}: {name} is not in the hostfile; expected one of {', '.join(hosts)}")
        slots = set(range(hosts[name].slots)) if match[2] is None else {int(slot) for slot in match[2].split(",")}
        beyond = sorted(slots - set(range(hosts[name].slots)))
        if beyond:
            raise Refusal(f"{option} {text}: {name} has no slot {beyond[0]}; expected 0 to {hosts[name].slots - 1}")
        named.setdefault(name, set()).update(slots)
    return named


def is_host(name: str) -> bool:
    """Whether a text is a host name by RFC 1123 or an IPv4 address; ssh takes neither for an option."""
    if re.fullmatch(r"[0-9.]+", name):
        try:
            ip_address(name)
        except ValueError:
            return False
        return True
    return len(name) <= 253 and _HOST_NAME.fullmatch(name) is not None
