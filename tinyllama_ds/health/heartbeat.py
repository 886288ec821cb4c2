"""Rank-side liveness: heartbeats, stack dumps on request, and the death of the supervisor."""

import faulthandler
import json
import os
import secrets
import select
import signal
import socket
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Thread

from tinyllama_ds.distributed.messages import HANDSHAKE_SECONDS, MessageConnection, is_proof, proof
from tinyllama_ds.errors import log
from tinyllama_ds.files import read_secret
from tinyllama_ds.layout import (
    FIRST_STEP,
    HEARTBEAT_VARIABLE,
    LIFELINE_KEY_FILE,
    LIFELINE_VARIABLE,
    STACKS_SIGNAL,
    STARTING,
    SUPERVISOR_VARIABLE,
)

_BEAT_BYTES = 128
_PING_SECONDS = 2
_LONGEST_ANSWER = 1024  # bytes


class Heartbeat:
    """Reports the progress of this rank to the supervisor: by a file on its machine, from other hosts over TCP."""

    def __init__(self, rank: int, run_dir: Path | None = None) -> None:
        """`run_dir` has the key of a supervisor on another host; without one it has none."""
        self.began = time.perf_counter()
        directory = os.environ.get(HEARTBEAT_VARIABLE)
        self._file = None if directory is None else (Path(directory) / f"rank_{rank}").open("w")
        if directory is not None:
            self._stacks = (Path(directory) / f"stacks_{rank}").open("w")  # open as long as the process lives
            # Written by the C handler itself, so that a rank that holds the interpreter lock answers too.
            faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
            _die_with(int(os.environ[SUPERVISOR_VARIABLE]))
        self._step, self._doing = 0, STARTING
        value = os.environ.get(LIFELINE_VARIABLE)
        self._lifeline = None if value is None else _join(value, rank, run_dir and run_dir / LIFELINE_KEY_FILE)

    def beat(self, step: int, doing: str) -> None:
        """Report the step that this rank has reached, and what it is doing."""
        self._step, self._doing = step, doing
        self._report({"step": step, "doing": doing})

    @property
    def phase(self) -> str:
        """Start-up, a training step, or what follows one."""
        if self._doing == STARTING:
            return "start-up"
        if self._doing in (FIRST_STEP, "training"):
            return f"training step {self._step + 1}"
        return f"{self._doing} after step {self._step}"

    def fail(self, error: BaseException) -> None:
        """Report the error that ends this rank; the supervisor prints the first one of a run."""
        if self._lifeline is not None:
            self._lifeline.send({"error": f"{type(error).__name__}: {error}"})

    def report_exit(self, code: int) -> None:
        """Report the code of a regular exit."""
        self._report({"step": self._step, "doing": "exiting", "code": code})

    def _report(self, beat: dict) -> None:
        if self._lifeline is not None:
            self._lifeline.send(beat)
        if self._file is not None:
            # In place: the block of the first beat is still there on a full disk. The time of change is what counts.
            os.pwrite(self._file.fileno(), json.dumps({"pid": os.getpid()} | beat).ljust(_BEAT_BYTES).encode(), 0)


def _join(value: str, rank: int, key_file: Path | None) -> MessageConnection:
    """The connection to a supervisor on another host. When it breaks or falls silent, this host's ranks end."""
    address, port, silence, patience = value.rsplit(":", 3)
    deadline = time.monotonic() + float(patience)
    connection = None
    while connection is None:
        try:
            key = b"" if key_file is None else read_secret(key_file)
            connection = _connect(address, int(port), key, rank)
        except OSError as error:
            if time.monotonic() > deadline:
                _end_host(f"the supervisor at {address}:{port} does not answer: {error}")
            time.sleep(1)
    Thread(target=_keep, args=(connection, float(silence)), name="supervisor is alive", daemon=True).start()
    return connection


def _connect(address: str, port: int, key: bytes, rank: int) -> MessageConnection:
    """A connection, after both ends have proved that they have the key. Raises OSError if it is not the supervisor."""
    host, group, nonce = socket.gethostname(), os.getpgid(0), secrets.token_hex(16)
    with ExitStack() as on_error:
        opened = socket.create_connection((address, port), timeout=HANDSHAKE_SECONDS)
        connection = MessageConnection(on_error.enter_context(opened))
        theirs = (connection.receive(_LONGEST_ANSWER) or {}).get("nonce")
        greeting = {"rank": rank, "host": host, "group": group, "nonce": nonce}
        connection.send(greeting | {"proof": proof(key, "rank", theirs, rank, host, group, nonce)})
        answer = connection.receive(_LONGEST_ANSWER) or {}
        if not is_proof(answer.get("proof"), key, "supervisor", nonce):
            raise OSError("a different program listens there, or the key is that of a different start")
        on_error.pop_all()
    return connection


def _keep(connection: MessageConnection, silence: float) -> None:
    """Answer the supervisor until the connection breaks, then end this host's ranks."""
    connection.socket.settimeout(_PING_SECONDS)
    heard_at = time.monotonic()
    with suppress(ConnectionError):
        while time.monotonic() - heard_at < silence:
            message = connection.receive(_LONGEST_ANSWER)
            if message is not None:
                heard_at = time.monotonic()
            connection.send({"stacks": _stacks()} if message and "stacks" in message else {})
    _end_host("the connection to the supervisor is gone")


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def _die_with(supervisor: int) -> None:
    """End the whole process group, launcher and other ranks included, when the supervisor is gone."""
    descriptor = os.pidfd_open(supervisor)

    def wait() -> None:
        select.select([descriptor], [], [])  # a process descriptor is readable once the process has ended
        os.killpg(0, signal.SIGKILL)

    Thread(target=wait, name="supervisor is alive", daemon=True).start()


def _end_host(reason: str) -> None:
    """End the process group: this host's launcher and all of its ranks, or under MPI this rank."""
    log(f"{socket.gethostname()}: {reason}; ending")
    os.killpg(0, signal.SIGKILL)
