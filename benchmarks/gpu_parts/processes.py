"""One part as a process that ends when its time is over, with all that it started."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_LOOK_SECONDS = 0.2
_KILL_SECONDS = 5.0  # a process inside a system call of the driver may take that long to exit


@dataclass(frozen=True)
class End:
    """How a part ended; no code where it was cut."""

    code: int | None
    seconds: float


def adopt_orphans() -> None:
    """From now on what a child leaves behind becomes a child of this process, so that it can be found and killed."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run(command: list[str], environment: dict[str, str], log: Path, seconds: float, look: Callable[[], None]) -> End:
    """Run a command for so long at most, its output in `log`; `look` is called now and then.

    Nothing that it started is left when this returns or raises.
    """
    started = time.monotonic()
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        while process.poll() is None and time.monotonic() - started < seconds:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_SECONDS)
            look()
        return End(process.returncode, time.monotonic() - started)
    finally:
        kill_children()


def kill_children() -> None:
    """Kill all descendants of this process, and those that they start meanwhile."""
    deadline = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < deadline:
        children = psutil.Process().children(recursive=True)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        _reap(child.pid for child in children)
        if not children:
            return
        time.sleep(0.02)


def _reap(pids: Iterable[int]) -> None:
    """Take away the ended ones among our children; those of others are their parent's, until that has ended."""
    for pid in pids:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


class Interrupted(Exception):  # noqa: N818
    """This process was asked to end by a signal."""


def raise_on_signals() -> None:
    """Let SIGTERM, SIGINT and SIGHUP raise `Interrupted`, once; those that come later change nothing."""

    def raise_once(number: int, frame: object) -> None:
        for again in signals:
            signal.signal(again, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number).name)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in signals:
        signal.signal(number, raise_once)
