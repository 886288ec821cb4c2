"""The liveness connection between the supervisor and ranks on other hosts: TCP, with a heartbeat every 2 s.

When it breaks, the rank ends itself and all ranks of its host, and the supervisor ends the run. A closed connection is
detected at once, a host without power or network after `SILENCE_SECONDS`.

Messages are lines of JSON: a rank sends its identity, its progress, its first error, its stacks and its exit code; the
supervisor sends heartbeats and requests for stacks. Both ends first prove that they have the key of this start, which
is in a file of the run directory that only this user can read; no command line or environment has it, and it is never
sent.
"""

import json
import secrets
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tinyllama_ds.distributed.messages import HANDSHAKE_SECONDS, MessageConnection, is_proof, proof
from tinyllama_ds.errors import EXIT_CONFIG, EXIT_FINISHED, EXIT_NUMERICS, EXIT_RESTART, EXIT_ROLLBACK
from tinyllama_ds.files import Kinds
from tinyllama_ds.launch.environment import write_private

SILENCE_SECONDS = 30
_PING_SECONDS = 2
_JOIN_SECONDS = 240  # from the first rank that connects to the last
_END_SECONDS = 3  # from closing the connections to the end of the ranks
_STACKS_SECONDS = 10  # for stacks to arrive
_MAX_MESSAGE, _MAX_HANDSHAKE = 1 << 20, 1 << 12  # bytes
_MAX_UNAUTHENTICATED = 256  # at a time; then the oldest is dropped, as a process has a limit of open files
_LARGEST_GROUP = 2**22  # the largest process id
_GREETING: dict[str, Kinds] = {"rank": int, "host": str, "group": int, "nonce": str, "proof": str}
_EXIT_CODES = (EXIT_FINISHED, EXIT_RESTART, EXIT_ROLLBACK, EXIT_CONFIG, EXIT_NUMERICS)


@dataclass(eq=False)
class _Rank:
    """One connection; `number` is None until the rank has authenticated."""

    connection: MessageConnection
    last_seen: float
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))  # challenge for the rank's proof of its key
    number: int | None = None
    host: str = "?"
    group: int = 0
    has_reported_exit: bool = False
    has_shown_stacks: bool = False

    def __str__(self) -> str:
        return f"rank {self.number} on {self.host}"

    def receive(self) -> dict | None:
        if self.number is None:
            return self.connection.receive(_MAX_HANDSHAKE, **_GREETING)
        return self.connection.receive(_MAX_MESSAGE)


def lifeline_value(address: str, port: int, patience: int = 120) -> str:
    """The value of `LIFELINE_VARIABLE`; a rank tries for `patience` seconds to connect and to read the key.

    The supervisor may not be up yet, and shared storage may show the key late.
    """
    return f"{address}:{port}:{SILENCE_SECONDS}:{patience}"


class Lifeline:
    """The supervisor's end. All work is done in `poll`, which the supervisor calls several times a second."""

    def __init__(self, directory: Path, address: str, port: int = 0, key_file: Path | None = None) -> None:
        """Listen on a port, by default a free one; reports of the ranks are written to `directory`, as local ranks do.

        Without a key file, as for a short job, connections are not authenticated.
        """
        self._directory = directory
        self._key_file, self._key = key_file, b""
        self._server = socket.create_server(("", port), backlog=1024)
        self._server.setblocking(False)
        self.value = lifeline_value(address, self._server.getsockname()[1])
        if key_file is not None:
            self._key = secrets.token_hex(32).encode()
            write_private(key_file, self._key)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._ranks: list[_Rank] = []
        self._hosts: Sequence[str] = ()
        self._first_at: float | None = None
        self._pinged_at = 0.0
        self._error: str | None = None
        self._death: str | None = None  # has priority: the errors of other ranks follow from it

    def expect(self, hosts: Sequence[str]) -> None:
        """The host of every rank, by rank."""
        self._hosts = hosts

    def poll(self) -> str | None:
        """Process all messages; a sentence about the first rank that failed, died or stopped responding, else None."""
        now = time.monotonic()
        for key, _ in self._selector.select(0):
            if key.fileobj is self._server:
                self._accept_all(now)
            else:
                self._receive_from(key.data, now)
        self._drop_unauthenticated(now)
        if now - self._pinged_at > _PING_SECONDS:
            self._pinged_at = now
            self._broadcast({})
        return self._death or self._error or self._silent(now) or self._missing(now)

    def stacks(self) -> None:
        """Request the stacks of all ranks, and wait up to 10 s for them."""
        self._broadcast({"stacks": True})
        end = time.monotonic() + _STACKS_SECONDS
        while time.monotonic() < end and not all(rank.has_shown_stacks for rank in self._authenticated()):
            self.poll()
            time.sleep(0.1)

    def close(self) -> list[tuple[str, int]]:
        """Close all connections, at which the ranks end; returns host and process group of those that did not."""
        for rank in self._ranks:
            with suppress(OSError):
                rank.connection.socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _END_SECONDS
        while self._ranks and time.monotonic() < deadline:
            for key, _ in self._selector.select(0.1):
                if key.fileobj is not self._server:
                    self._receive_from(key.data, time.monotonic())
        left = [(self._host_of(rank), rank.group) for rank in self._authenticated()]
        for rank in self._ranks:
            rank.connection.socket.close()
        self._ranks.clear()
        self._selector.close()
        self._server.close()
        if self._key_file is not None:
            with suppress(OSError):
                self._key_file.unlink()
        return left

    def _host_of(self, rank: _Rank) -> str:
        """The host's name in the hostfile, as ssh knows it."""
        is_known = rank.number is not None and rank.number < len(self._hosts)
        return self._hosts[rank.number] if is_known and rank.number is not None else rank.host

    def _accept_all(self, now: float) -> None:
        with suppress(OSError):  # none left, or too many open files
            for _ in range(_MAX_UNAUTHENTICATED):
                connection, _ = self._server.accept()
                connection.setblocking(False)
                rank = _Rank(MessageConnection(connection), now)
                self._ranks.append(rank)
                self._selector.register(rank.connection, selectors.EVENT_READ, rank)
                rank.connection.send({"nonce": rank.nonce})

    def _drop_unauthenticated(self, now: float) -> None:
        unauthenticated = [rank for rank in self._ranks if rank.number is None]
        too_many = len(unauthenticated) - _MAX_UNAUTHENTICATED
        for place, rank in enumerate(unauthenticated):  # the oldest first
            if place < too_many or now - rank.last_seen > HANDSHAKE_SECONDS:
                self._drop(rank)

    def _receive_from(self, rank: _Rank, now: float) -> None:
        """Read all data up to the end of the connection, so that a death is seen before the errors that it causes."""
        try:
            while (message := rank.receive()) is not None:
                if rank.number is None:
                    self._authenticate(rank, message)
                rank.last_seen = now
                self._handle(rank, message)
        except ConnectionError:
            self._drop(rank)

    def _handle(self, rank: _Rank, message: dict) -> None:
        match message:
            case {"step": int(step), "doing": str(doing)}:
                beat: dict = {"step": step, "doing": doing}
                code = message.get("code")
                if isinstance(code, int) and code in _EXIT_CODES:
                    rank.has_reported_exit = True
                    beat["code"] = code
                (self._directory / f"rank_{rank.number}").write_text(json.dumps(beat))
            case {"stacks": str(stacks)}:
                (self._directory / f"stacks_{rank.number}").write_text(stacks)
                rank.has_shown_stacks = True
            case {"error": str(error)}:
                rank.has_reported_exit = True
                self._error = self._error or f"{rank}: {error}"

    def _authenticate(self, rank: _Rank, message: dict) -> None:
        """Raises ConnectionError unless this is a rank of this run with the key, and its first connection."""
        number, host, group, nonce, shown = (message[name] for name in _GREETING)
        is_ours = is_proof(shown, self._key, "rank", rank.nonce, number, host, group, nonce)
        is_known = not self._hosts or number < len(self._hosts)
        is_new = all(other.number != number for other in self._ranks)
        if not (is_ours and is_known and is_new and 1 < group < _LARGEST_GROUP):  # kill -1 would kill all processes
            raise ConnectionError("is not a rank of this run")
        rank.number, rank.host, rank.group = number, host, group
        self._first_at = self._first_at or time.monotonic()
        rank.connection.send({"proof": proof(self._key, "supervisor", nonce)})

    def _drop(self, rank: _Rank) -> None:
        self._ranks.remove(rank)
        self._selector.unregister(rank.connection)
        rank.connection.socket.close()
        if rank.number is not None and not rank.has_reported_exit:
            self._death = self._death or f"{rank} has died"

    def _silent(self, now: float) -> str | None:
        silent = [rank for rank in self._authenticated() if now - rank.last_seen > SILENCE_SECONDS]
        if not silent:
            return None
        why = "it is stopped, or its host or the network is down"
        return f"{silent[0]} has not responded for {SILENCE_SECONDS} s: {why}"

    def _missing(self, now: float) -> str | None:
        if self._first_at is None or now - self._first_at < _JOIN_SECONDS:
            return None
        self._first_at = now + 365 * 86400  # reported once
        there = {rank.number for rank in self._ranks}
        missing = [number for number in range(len(self._hosts)) if number not in there]
        if not missing:
            return None
        return f"rank {missing[0]} on {self._hosts[missing[0]]} did not start within {_JOIN_SECONDS} s"

    def _broadcast(self, message: dict) -> None:
        for rank in self._authenticated():
            rank.connection.send(message)

    def _authenticated(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.number is not None]
