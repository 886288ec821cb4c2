"""Faults on purpose, for the tests: `TINYLLAMA_DS_FAULT="point:rank:step:action"` strikes one rank at one point.

A process without the variable pays one comparison per point. A step `3+` means every step from 3 on. After a restart by
the supervisor a fault does not strike again, unless `:always` is appended.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from tinyllama_ds.errors import Refusal

FAULT_VARIABLE = "TINYLLAMA_DS_FAULT"
RESTART_VARIABLE = "TINYLLAMA_DS_RESTART"  # how often the supervisor has restarted the run
_FOR_EVER = 2**63
ACTIONS = ("kill", "stop", "spin", "block", "pause", "raise", "poison")


@dataclass(frozen=True)
class _Fault:
    point: str
    rank: int
    steps: range
    action: str


def strike(point: str, step: int) -> bool:
    """Do what was ordered for this point, rank and step; True where the caller is to poison its numbers."""
    fault = _ordered()
    if fault is None or fault.point != point or step not in fault.steps:
        return False
    if fault.rank != int(os.environ.get("RANK", "0")):
        return False
    if fault.action == "raise":
        raise OSError(f"injected at {point} of step {step}")
    if fault.action in _WAITS:
        _WAITS[fault.action]()
        return False
    if fault.action != "poison":
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault.action])
    return fault.action == "poison"


def _spin() -> None:
    """A rank that is alive and gets nowhere, none of its threads does: PyDLL keeps the interpreter lock."""
    while True:
        ctypes.PyDLL(None).sleep(1)


def _block() -> None:
    """One thread gets nowhere."""
    while True:
        time.sleep(1)


_WAITS: dict[str, Callable[[], None]] = {"spin": _spin, "block": _block, "pause": partial(time.sleep, 5)}


@cache
def _ordered() -> _Fault | None:
    text = os.environ.get(FAULT_VARIABLE)
    if not text:
        return None
    point, rank, step, action, *more = text.split(":")
    if action not in ACTIONS or more not in ([], ["always"]):
        raise Refusal(f"{FAULT_VARIABLE}: {text!r} is not point:rank:step:action with action {' or '.join(ACTIONS)}")
    restarted = os.environ.get(RESTART_VARIABLE, "0") != "0"
    if restarted and not more:
        return None
    first = int(step.removesuffix("+"))
    return _Fault(point, int(rank), range(first, _FOR_EVER if step.endswith("+") else first + 1), action)
