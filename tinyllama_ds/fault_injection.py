"""Fault injection for the tests: `TINYLLAMA_DS_FAULT="point:rank:step:action"` hits one rank at one point of one step.

`install` wraps the function of that point (`POINTS`); without the variable nothing is wrapped. A step `3+` means every
step from 3 on. After a restart by the supervisor a fault is not repeated, unless `:always` is appended, or `:N` for the
first N restarts.
"""

import ctypes
import os
import pkgutil
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Literal

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.layout import RESTART_VARIABLE

FAULT_VARIABLE = "TINYLLAMA_DS_FAULT"
_UNLIMITED = 2**63
_CONTINUE_SECONDS = 1  # after SIGSTOP, so that stacks requested meanwhile show the point
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_FACTORS = {"poison": float("nan"), "overflow": float("inf"), "spike": 50.0}
ACTIONS = (*_SIGNALS, "spin", "block", "pause", "raise", "exhaust", *_FACTORS)
_STEP_IN_PATH = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Point:
    """A function of the package, and whether the fault hits before or after it.

    An action that is a factor multiplies the last argument before, or the result after. The step is found in the
    arguments (`_step_in`); where there is none it is the step that is being trained.
    """

    function: str  # with its module, and its class if it is a method
    when: Literal["before", "after"] = "before"


_TRAIN_STEP = Point("train.trainer.Trainer.train_step")
POINTS = {
    "start": Point("train.pretrain.resolve"),
    "data.read": Point("train.batches._read_step"),
    "step.begin": _TRAIN_STEP,
    "step.forward": Point("train.step.forward", "after"),
    "step.backward": Point("train.step.backward"),
    "step.before_optimizer": Point("train.trainer.apply_gradients"),
    "save.copy": Point("checkpoint.staging.HostStateBuffer.copy_from"),
    "save.begin": Point("checkpoint.save.write_file"),
    "save.mid_shard": Point("checkpoint.save._sync_and_hash"),
    "save.after_shard": Point("checkpoint.save.write_file", "after"),
    "save.agreed": Point("checkpoint.save.Saver._agree"),
    "save.before_manifest": Point("checkpoint.save._commit"),
    "save.before_rename": Point("checkpoint.save._rename"),
    "save.after_rename": Point("checkpoint.save._rename", "after"),
    "save.ended": Point("checkpoint.save.Saver._end"),
    "purge.mid": Point("checkpoint.retention._move_to_trash", "after"),
}


@dataclass(frozen=True)
class Fault:
    """What the variable orders."""

    point: str
    rank: int
    steps: range
    action: str


def install() -> None:
    """Wrap the function of the ordered point, on the ordered rank. Raises `ConfigError` for a malformed variable."""
    fault = _read_fault()
    if fault is None or fault.rank != int(os.environ.get("RANK", "0")):
        return
    training = [0]  # the number of the step, in a cell

    def note(arguments: tuple) -> float:
        training[0] = _step_in(arguments) or 0
        return 1.0

    def inject(arguments: tuple) -> float:
        step = _step_in(arguments)
        return _act(fault, training[0] if step is None else step)

    _wrap(_TRAIN_STEP, note)
    _wrap(POINTS[fault.point], inject)


def _wrap(point: Point, inject: Callable[[tuple], float]) -> None:
    owner_name, _, name = f"tinyllama_ds.{point.function}".rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    function = getattr(owner, name)
    first = int(isinstance(owner, type))  # of a method's arguments, after self

    @wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        if point.when == "before":
            factor = inject(arguments[first:])
            if factor != 1.0:
                arguments = (*arguments[:-1], arguments[-1] * factor)
            return function(*arguments, **named)
        result = function(*arguments, **named)
        factor = inject(arguments[first:])
        if factor == 1.0:
            return result
        return tuple(part * factor for part in result) if isinstance(result, tuple) else result * factor

    setattr(owner, name, wrapped)


def _step_in(arguments: tuple) -> int | None:
    """The step of a plan's step, a progress, what has one, or a path with `step_00000012` in it; None without any."""
    for argument in arguments:
        if isinstance(argument, str | os.PathLike):
            path = str(argument)
        else:
            progress = getattr(argument, "progress", argument)
            found = getattr(progress, "step", getattr(progress, "number", None))
            if isinstance(found, int):
                return found
            path = str(getattr(argument, "name", ""))  # of an open file
        match = _STEP_IN_PATH.search(path)
        if match:
            return int(match[1])
    return None


def _act(fault: Fault, step: int) -> float:
    """Do what was ordered, if this is the step; returns the factor for the caller's numbers."""
    if step not in fault.steps:
        return 1.0
    if fault.action == "raise":
        raise OSError(f"injected at {fault.point} of step {step}")
    if fault.action == "exhaust":
        import torch

        raise torch.OutOfMemoryError(f"injected at {fault.point} of step {step}")
    if fault.action in _WAITS:
        _WAITS[fault.action]()
    if fault.action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[fault.action])
        time.sleep(_CONTINUE_SECONDS)
    return _FACTORS.get(fault.action, 1.0)


def _spin() -> None:
    """All threads of this rank hang: PyDLL keeps the interpreter lock."""
    while True:
        ctypes.PyDLL(None).sleep(1)


def _block() -> None:
    """One thread hangs."""
    while True:
        time.sleep(1)


_WAITS: dict[str, Callable[[], None]] = {"spin": _spin, "block": _block, "pause": partial(time.sleep, 5)}


def _read_fault() -> Fault | None:
    text = os.environ.get(FAULT_VARIABLE)
    if not text:
        return None
    point, rank, step, action, *more = text.split(":")
    if point not in POINTS or action not in ACTIONS or len(more) > 1:
        raise ConfigError(
            f"{FAULT_VARIABLE}: {text!r} is not point:rank:step:action; expected a point of {', '.join(POINTS)} and an"
            f" action of {', '.join(ACTIONS)}"
        )
    last_restart = _UNLIMITED if more == ["always"] else int("".join(more) or 0)
    if int(os.environ.get(RESTART_VARIABLE, "0")) > last_restart:
        return None
    first = int(step.removesuffix("+"))
    return Fault(point, int(rank), range(first, _UNLIMITED if step.endswith("+") else first + 1), action)
