"""Commands that run one after the other, or one on each host at a time, until one fails or a stop is requested."""

import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tinyllama_ds.distributed.session import handling_signals
from tinyllama_ds.errors import EXIT_FINISHED, EXIT_RESTART

_POLL_SECONDS = 0.2
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def run_queue(
    commands: Mapping[str, Callable[[str], list[str]]], hosts: Sequence[str], logs: Path, started: Callable[[str], None]
) -> int:
    """Run every command by its name, made for the host that it gets; returns the first exit code that is not 0.

    With one host the output goes to stderr, with several to a file per command in the folder `logs`. After a failure
    no command is started, and those at work go on. A stop signal is passed on to them.
    """
    waiting, free = deque(commands), deque(hosts)
    running: dict[subprocess.Popen, str] = {}
    codes: list[int] = []
    with _passing_signals_on(running, codes):
        while running or (waiting and not any(codes)):
            while waiting and free and not any(codes):
                name, host = waiting.popleft(), free.popleft()
                started(name)
                running[_start(commands[name](host), logs / f"{name}.log" if len(hosts) > 1 else None)] = host
            for process in [process for process in running if process.poll() is not None]:
                free.append(running.pop(process))
                codes.append(process.returncode)
            time.sleep(_POLL_SECONDS)
    return next(filter(None, codes), EXIT_FINISHED)


def _start(command: list[str], log_file: Path | None) -> subprocess.Popen:
    """In a session of its own: of a terminal's Ctrl-C it gets what is passed on, and not a second signal."""
    if log_file is None:
        return subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    with log_file.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)


@contextmanager
def _passing_signals_on(running: Mapping[subprocess.Popen, str], codes: list[int]) -> Iterator[None]:
    """A stop request is an exit code too, so that nothing is started after it."""

    def pass_on(number: int, _frame: object) -> None:
        codes.append(EXIT_RESTART)
        for process in list(running):
            process.send_signal(number)

    with handling_signals(_STOP_SIGNALS, pass_on):
        yield
