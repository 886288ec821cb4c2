"""The hostfile: `host slots=N` per line, read more strictly than DeepSpeed reads it.

A host becomes an argument of ssh and pdsh, so a line that either could interpret as an option or a list is rejected.
"""

import io
import re
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from tinyllama_ds.errors import ConfigError, raise_problems, shown
from tinyllama_ds.inputs import read_text

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")  # RFC 1123
_LINE = re.compile(r"(\S+)\s+slots=0*(\d+)", re.ASCII)
_FILTER = re.compile(r"([^\s:@]+)(?::(\d{1,9}(?:,\d{1,9})*))?", re.ASCII)
MOST_SLOTS = 1024  # no machine has so many GPUs


@dataclass(frozen=True)
class Host:
    """One machine, and which of its GPUs to use: all of its `slots`, unless `devices` names some."""

    name: str
    slots: int
    devices: tuple[int, ...] | None = None

    @property
    def ranks(self) -> int:
        """The number of processes on this host."""
        return self.slots if self.devices is None else len(self.devices)

    @property
    def takes_first(self) -> bool:
        """Whether its GPUs are the first ones, all that MPI and Slurm can select."""
        return self.devices is None or self.devices == tuple(range(len(self.devices)))


def read_hostfile(path: Path) -> list[Host]:
    """All hosts in the order of the file; raises `ConfigError` that lists every invalid line by number."""
    hosts: dict[str, Host] = {}
    problems = []
    text = read_text(path, "the hostfile", keep_mark=True)
    if text.startswith("\ufeff"):  # which DeepSpeed's launcher takes for a part of the first host's name
        raise ConfigError(f"{path}:1: begins with a byte order mark; expected UTF-8 without one")
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):  # lines as DeepSpeed counts them
        content = line.strip()
        if not content or content.startswith("#"):
            continue
        host = _read_line(content, hosts)
        if isinstance(host, Host):
            hosts[host.name] = host
        else:
            problems.append((number, host))
    if len(problems) == 1:
        raise ConfigError(f"{path}:{problems[0][0]}: {problems[0][1]}")
    raise_problems(path, [f"line {number}: {problem}" for number, problem in problems])
    if not hosts:
        raise ConfigError(f"{path}: has no hosts; expected lines such as 'node1 slots=8'")
    return list(hosts.values())


def _read_line(content: str, before: Collection[str]) -> Host | str:
    """The host of a line, or the problem with it; `before` are the hosts of the lines above."""
    match = _LINE.fullmatch(content)
    if match is None:
        return f"{shown(content)} is not of the form 'host slots=N'"
    name, digits = match.groups()
    if not is_host(name):
        return f"{shown(name)} is neither a host name nor an IPv4 address"
    slots = int(digits[:5])
    if not 1 <= slots <= MOST_SLOTS:
        return f"slots={shown(digits)[1:-1]}; expected the number of GPUs of {name}, from 1 to {MOST_SLOTS}"
    if name in before:
        return f"{name} is listed twice; give each host one line with all its slots"
    return Host(name, slots)


def filter_hosts(hosts: list[Host], include: str | None, exclude: str | None) -> list[Host]:
    """Apply `--include` or `--exclude` in DeepSpeed's grammar: `host1@host2:0,2`; a host alone means all its slots.

    Raises `ConfigError` for a host or slot that is not in the hostfile, and if no host is left.
    """
    if include and exclude:
        raise ConfigError("--include and --exclude were both given; expected one of them")
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
        raise ConfigError(f"{option} {text}: excludes all GPUs")
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
            raise ConfigError(f"{option} {text}: {part!r} is not of the form 'host' or 'host:0,2'; '@' separates hosts")
        name = match[1]
        if name not in hosts:
            raise ConfigError(f"{option} {text}: {name} is not in the hostfile; expected one of {', '.join(hosts)}")
        slots = set(range(hosts[name].slots)) if match[2] is None else {int(slot) for slot in match[2].split(",")}
        beyond = sorted(slots - set(range(hosts[name].slots)))
        if beyond:
            raise ConfigError(f"{option} {text}: {name} has no slot {beyond[0]}; expected 0 to {hosts[name].slots - 1}")
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
