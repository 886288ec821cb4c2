"""Detects processes that the kernel's out-of-memory killer has ended, by its counters."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/proc/self/cgroup")
_MACHINE = Path("/proc/vmstat")
_MOUNT = Path("/sys/fs/cgroup")
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def count_oom_kills() -> int:
    """The number of processes killed so far in this control group, else on this machine."""
    for path in (*_own_counters(), _MACHINE):
        with suppress(OSError):
            found = _COUNT.search(path.read_text())
            if found is not None:
                return int(found[1])
    return 0


def _own_counters() -> Iterator[Path]:
    """The counters of cgroup v2 and v1, as /proc/self/cgroup names them."""
    with suppress(OSError):
        for line in _CGROUPS.read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if not controllers:
                yield _MOUNT / place.lstrip("/") / "memory.events"
            elif "memory" in controllers.split(","):
                yield _MOUNT / "memory" / place.lstrip("/") / "memory.oom_control"
