"""Faults on purpose, for the tests: `TINYLLAMA_DS_FAULT="point:rank:step:action"` strikes one rank at one point.

A process without the variable pays one comparison per point. A step `3+` means every step from 3 on. After a restart by
the supervisor a fault does not strike again, unless `:always` is appended, or `:N` for the first N restarts.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.layout import RESTART_VARIABLE

FAULT_VARIABLE = "TINYLLAMA_DS_FAULT"
_FOR_EVER = 2**63
_WAKING_SECONDS = 1  # after a stop, so that stacks asked for meanwhile show where it was
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_FACTORS = {"poison": float("nan"), "overflow": float("inf"), "spike": 50.0}
ACTIONS = (*_SIGNALS, "spin", "block", "pause", "raise", "exhaust", *_FACTORS)


@dataclass(frozen=True)
class _Fault:
    point: str
    rank: int
    steps: range
    action: str


def maybe_inject_fault(point: str, step: int) -> float:
    """Do what was ordered for this point, rank and step; returns what the caller is to multiply its numbers by."""
    fault = _ordered()
    if fault is None or fault.point != point or step not in fault.steps:
        return 1.0
    if fault.rank != int(os.environ.get("RANK", "0")):
        return 1.0
    if fault.action == "raise":
        raise OSError(f"injected at {point} of step {step}")
    if fault.action == "exhaust":
        raise torch.OutOfMemoryError(f"injected at {point} of step {step}")
    if fault.action in _WAITS:
        _WAITS[fault.action]()
    if fault.action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[fault.action])
        time.sleep(_WAKING_SECONDS)
    return _FACTORS.get(fault.action, 1.0)


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
    if action not in ACTIONS or len(more) > 1:
        raise ConfigError(
            f"{FAULT_VARIABLE}: {text!r} is not point:rank:step:action with action {' or '.join(ACTIONS)}"
        )
    last_restart = _FOR_EVER if more == ["always"] else int("".join(more) or 0)
    if int(os.environ.get(RESTART_VARIABLE, "0")) > last_restart:
        return None
    first = int(step.removesuffix("+"))
    return _Fault(point, int(rank), range(first, _FOR_EVER if step.endswith("+") else first + 1), action)
