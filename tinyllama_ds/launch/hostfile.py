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


@dataclass(frozen=True)
class Host:
    name: str
    slots: int


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
        if not _is_host(name):
            raise Refusal(f"{path}:{number}: {name!r} is neither a host name nor an IPv4 address")
        if slots < 1:
            raise Refusal(f"{path}:{number}: slots=0; expected the number of GPUs of {name}")
        if name in hosts:
            raise Refusal(f"{path}:{number}: {name} is listed twice; give each host one line with all its slots")
        hosts[name] = Host(name, slots)
    if not hosts:
        raise Refusal(f"{path}: names no host; expected lines such as 'node1 slots=8'")
    return list(hosts.values())


def _is_host(name: str) -> bool:
    if re.fullmatch(r"[0-9.]+", name):
        try:
            ip_address(name)
        except ValueError:
            return False
        return True
    return len(name) <= 253 and _HOST_NAME.fullmatch(name) is not None
