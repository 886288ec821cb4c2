"""Sessions of local processes, such as a launcher and its ranks, that end together."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO

import psutil


def run_in_session(command: list[str], environment: dict[str, str], stderr: IO[str] | None = None) -> int:
    """The exit code of a command, run in a session of its own, of which nothing is left when this returns or raises.

    A SIGTERM to the deepspeed command alone would orphan its ranks. With `stderr`, a file, stdout is dropped.
    """
    stdout = None if stderr is None else subprocess.DEVNULL
    with exiting_on_signals():
        process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=stdout, stderr=stderr)
        try:
            return process.wait()
        finally:
            end_session(process)


@contextmanager
def exiting_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise `SystemExit`, so that sessions are ended and temporary files removed."""
    # Those that are ignored stay so, as nohup sets it.
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    with handling_signals(numbers, _exit):
        yield


@contextmanager
def handling_signals(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle these signals, and restore the handlers of before at the end."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def end_session(process: subprocess.Popen, gently: bool = True) -> None:
    """Kill all processes of the session that `process` leads, in any process group. Returns when all have ended."""
    if gently and process.poll() is None:
        process.terminate()  # so that the launcher ends the ranks on other hosts
        with suppress(subprocess.TimeoutExpired):
            process.wait(3)
    for _ in range(100):
        members = _members(process.pid)
        if not members:
            break
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(members, timeout=0.2)
    process.wait()


def _members(leader: int) -> list[psutil.Process]:
    members = []
    for candidate in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(candidate.pid) == leader and candidate.info["status"] != psutil.STATUS_ZOMBIE:
                members.append(candidate)
    return members
