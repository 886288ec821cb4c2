"""What a rank owes its supervisor: a sign of life per step, its stacks on request, and not to outlive it."""

import faulthandler
import json
import os
import select
import signal
from pathlib import Path
from threading import Thread

SUPERVISOR_VARIABLE = "TINYLLAMA_DS_SUPERVISOR"  # its process id
HEARTBEAT_VARIABLE = "TINYLLAMA_DS_HEARTBEATS"  # its private directory
STACKS_SIGNAL = signal.SIGUSR2
_BEAT_BYTES = 128


class Heartbeat:
    """Writes `rank_N` into the supervisor's directory; without a supervisor on this machine it does nothing."""

    def __init__(self, rank: int) -> None:
        directory = os.environ.get(HEARTBEAT_VARIABLE)
        self._file = None if directory is None else (Path(directory) / f"rank_{rank}").open("w")
        if directory is not None:
            self._stacks = (Path(directory) / f"stacks_{rank}").open("w")  # open as long as the process lives
            # Written by the C handler itself, so that a rank that holds the interpreter lock answers too.
            faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
            _die_with(int(os.environ[SUPERVISOR_VARIABLE]))

    def beat(self, step: int, doing: str) -> None:
        """Say that this rank got as far as `step`, and what it does now."""
        if self._file is None:
            return
        beat = json.dumps({"pid": os.getpid(), "step": step, "doing": doing}).ljust(_BEAT_BYTES)
        # In place: the block that the first beat took is still there on a full disk. The time of change is what counts.
        os.pwrite(self._file.fileno(), beat.encode(), 0)


def _die_with(supervisor: int) -> None:
    """End the whole process group, launcher and other ranks included, when the supervisor is gone."""
    descriptor = os.pidfd_open(supervisor)

    def wait() -> None:
        select.select([descriptor], [], [])  # a process descriptor is readable once the process has ended
        os.killpg(0, signal.SIGKILL)

    Thread(target=wait, name="supervisor is alive", daemon=True).start()
