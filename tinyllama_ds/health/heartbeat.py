"""Rank-side liveness: heartbeats, stack dumps on request, and the death of the supervisor."""

import faulthandler
import json
import os
import secrets
import select
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread

from tinyllama_ds.distributed.network import is_proof, proof
from tinyllama_ds.files import parse_row, read_secret
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
_ANSWER_SECONDS = 30
_LONGEST_ANSWER = 1024  # bytes


class Heartbeat:
    """Tells the supervisor how far this rank is: by a file on its machine, by a connection from other hosts."""

    def __init__(self, rank: int, run_dir: Path | None = None) -> None:
        """`run_dir` is where the key of a supervisor on another host lies; without one it has none."""
        self.began = time.perf_counter()
        directory = os.environ.get(HEARTBEAT_VARIABLE)
        self._file = None if directory is None else (Path(directory) / f"rank_{rank}").open("w")
        if directory is not None:
            self._stacks = (Path(directory) / f"stacks_{rank}").open("w")  # open as long as the process lives
            # Written by the C handler itself, so that a rank that holds the interpreter lock answers too.
            faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
            _die_with(int(os.environ[SUPERVISOR_VARIABLE]))
        self._step, self._doing = 0, STARTING
        line = os.environ.get(LIFELINE_VARIABLE)
        self._lifeline = None if line is None else _Lifeline(line, rank, run_dir and run_dir / LIFELINE_KEY_FILE)

    def beat(self, step: int, doing: str) -> None:
        """Report the step that this rank has reached, and what it is doing."""
        self._step, self._doing = step, doing
        if self._lifeline is not None:
            self._lifeline.log_line({"step": step, "doing": doing})
        self._write({"doing": doing})

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
            self._lifeline.log_line({"error": f"{type(error).__name__}: {error}"})

    def report_exit(self, code: int) -> None:
        """Report that this rank exits in order, and its code."""
        if self._lifeline is not None:
            self._lifeline.log_line({"report_exit": code})
        self._write({"doing": "leaving", "code": code})

    def _write(self, beat: dict) -> None:
        if self._file is None:
            return
        text = json.dumps({"pid": os.getpid(), "step": self._step} | beat).ljust(_BEAT_BYTES)
        # In place: the block that the first beat took is still there on a full disk. The time of change is what counts.
        os.pwrite(self._file.fileno(), text.encode(), 0)


class _Lifeline:
    """The connection to a supervisor on another host. When it breaks or falls silent, this host's ranks end."""

    def __init__(self, line: str, rank: int, key_file: Path | None) -> None:
        address, port, silence, patience = line.rsplit(":", 3)
        self._silence = float(silence)
        self._connection = _connect(address, int(port), float(patience), rank, key_file)
        self._sending = Lock()
        Thread(target=self._keep, name="supervisor is alive", daemon=True).start()

    def log_line(self, message: dict) -> None:
        with self._sending, suppress(OSError):  # a broken line is noticed by `_keep`
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _keep(self) -> None:
        self._connection.settimeout(_PING_SECONDS)
        heard_at = time.monotonic()
        while time.monotonic() - heard_at < self._silence:
            try:
                received = self._connection.recv(1 << 16)
            except TimeoutError:
                received = None
            except OSError:
                received = b""
            if received == b"":
                break
            if received is not None:
                heard_at = time.monotonic()
                if b"stacks" in received:
                    self.log_line({"stacks": _stacks()})
            self.log_line({})
        _end_host("the connection to the supervisor is gone")


def _connect(address: str, port: int, patience: float, rank: int, key_file: Path | None) -> socket.socket:
    """The connection, after both ends have proven that they have the key; whoever else listens there is left alone."""
    deadline = time.monotonic() + patience
    while True:
        connection = None
        try:
            key = b"" if key_file is None else read_secret(key_file)
            connection = socket.create_connection((address, port), timeout=_ANSWER_SECONDS)
            _greet(connection, key, rank)
            return connection
        except OSError as error:
            if connection is not None:
                connection.close()
            if time.monotonic() > deadline:
                _end_host(f"the supervisor at {address}:{port} does not answer: {error}")
        time.sleep(1)


def _greet(connection: socket.socket, key: bytes, rank: int) -> None:
    """Raises OSError where the other end is not the supervisor."""
    host, group, nonce = socket.gethostname(), os.getpgid(0), secrets.token_hex(16)
    theirs = _answer(connection).get("nonce")
    greeting = {"rank": rank, "host": host, "group": group, "nonce": nonce}
    greeting["proof"] = proof(key, "rank", theirs, rank, host, group, nonce)
    connection.sendall(json.dumps(greeting).encode() + b"\n")
    if not is_proof(_answer(connection).get("proof"), key, "supervisor", nonce):
        raise OSError("somebody else listens there, or the key is that of another start")


def _answer(connection: socket.socket) -> dict:
    """The next line, byte by byte: what follows it is for somebody else."""
    line, deadline = b"", time.monotonic() + _ANSWER_SECONDS
    while not line.endswith(b"\n") and len(line) < _LONGEST_ANSWER and time.monotonic() < deadline:
        received = connection.recv(1)
        if not received:
            raise OSError("hung up")
        line += received
    return parse_row(line) or {}


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
    with suppress(OSError):
        print(f"tinyllama-ds: {socket.gethostname()}: {reason}; ending", file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGKILL)
