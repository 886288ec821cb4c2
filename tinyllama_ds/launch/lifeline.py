"""The line between the supervisor and ranks on other hosts: one TCP connection each, with a sign of life every 2 s.

Where it breaks, both ends know: the rank ends itself and all of its host's ranks, the supervisor ends the run. A broken
connection is known at once, a host without power or network after `SILENCE_SECONDS`.

Lines of JSON pass: from a rank its name, its beats, its first error, its stacks and its farewell, from the supervisor
nothing but life signs and the wish for stacks. Nobody takes part without the token that the ranks got with their start.
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

SILENCE_SECONDS = 30
_PING_SECONDS = 2
_GATHER_SECONDS = 240  # from the first rank that comes to life to the last
_END_SECONDS = 3  # from the cut to the end of the ranks
_STACKS_SECONDS = 10  # for the answers of those that can
_LONGEST_MESSAGE = 1 << 20


@dataclass(eq=False)
class _Rank:
    """One connection; `number` is None until the rank has said who it is."""

    connection: socket.socket
    heard_at: float
    number: int | None = None
    host: str = "?"
    group: int = 0
    has_left: bool = False
    has_shown_stacks: bool = False
    received: bytes = field(default=b"", repr=False)

    @property
    def is_expected_to_answer(self) -> bool:
        return self.number is not None and not self.has_shown_stacks


def lifeline_value(address: str, port: int, token: str, patience: int = 0) -> str:
    """What a rank needs to know; it may try for `patience` seconds to reach a supervisor that is not up yet."""
    return f"{address}:{port}:{token}:{SILENCE_SECONDS}:{patience}"


class Lifeline:
    """The supervisor's end. Everything happens in `look`, which the supervisor calls several times a second."""

    def __init__(self, directory: Path, address: str, port: int = 0, token: str = "") -> None:
        """Listen on a port, by default a free one; `directory` takes what ranks report, as if they were here."""
        self._directory = directory
        self._token = token or secrets.token_hex(8)
        self._server = socket.create_server(("", port), backlog=1024)
        self._server.setblocking(False)
        self.value = lifeline_value(address, self._server.getsockname()[1], self._token)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._ranks: list[_Rank] = []
        self._hosts: Sequence[str] = ()
        self._first_at: float | None = None
        self._pinged_at = 0.0
        self._error: str | None = None
        self._death: str | None = None  # comes before errors: the others fail because of it
        self.code: int | None = None  # with which the first rank ended of its own accord

    def expect(self, hosts: Sequence[str]) -> None:
        """The host of every rank, by rank."""
        self._hosts = hosts

    def look(self) -> str | None:
        """Hear what the ranks say; a sentence about the first that has failed, died or fallen silent."""
        now = time.monotonic()
        for key, _ in self._selector.select(0):
            if key.fileobj is self._server:
                self._accept(now)
            else:
                self._hear(key.data, now)
        if now - self._pinged_at > _PING_SECONDS:
            self._pinged_at = now
            self._tell({})
        return self._death or self._error or self._silent(now) or self._missing(now)

    def stacks(self) -> None:
        """Ask all ranks for their stacks, and wait for the answers of those that can."""
        self._tell({"stacks": True})
        end = time.monotonic() + _STACKS_SECONDS
        while any(rank.is_expected_to_answer for rank in self._ranks) and time.monotonic() < end:
            self.look()
            time.sleep(0.1)

    def close(self) -> list[tuple[str, int]]:
        """Cut all lines, at which every rank ends its host's ranks; host and process group of those that do not."""
        for rank in self._ranks:
            with suppress(OSError):
                rank.connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _END_SECONDS
        while self._ranks and time.monotonic() < deadline:
            for key, _ in self._selector.select(0.1):
                if key.fileobj is not self._server:
                    self._hear(key.data, time.monotonic())
        left = [(self._host_of(rank), rank.group) for rank in self._ranks if rank.number is not None]
        for rank in self._ranks:
            rank.connection.close()
        self._ranks.clear()
        self._selector.close()
        self._server.close()
        return left

    def _host_of(self, rank: _Rank) -> str:
        """As the hostfile calls it, which ssh understands."""
        is_known = rank.number is not None and rank.number < len(self._hosts)
        return self._hosts[rank.number] if is_known and rank.number is not None else rank.host

    def _accept(self, now: float) -> None:
        connection, _ = self._server.accept()
        connection.setblocking(False)
        rank = _Rank(connection, now)
        self._ranks.append(rank)
        self._selector.register(connection, selectors.EVENT_READ, rank)

    def _hear(self, rank: _Rank, now: float) -> None:
        """Take in all that has come, the end too: a death must not be heard after the errors that it causes."""
        while rank in self._ranks and (received := _receive(rank.connection)) is not None:
            rank.heard_at = now
            rank.received += received
            *lines, rank.received = rank.received.split(b"\n")
            for line in lines:
                self._take(rank, line)
            if not received or len(rank.received) > _LONGEST_MESSAGE:
                self._drop(rank)

    def _take(self, rank: _Rank, line: bytes) -> None:
        try:
            message = json.loads(line)
            if rank.number is None:
                if not secrets.compare_digest(str(message["token"]), self._token):
                    raise ValueError("wrong token")
                rank.number, rank.host = int(message["rank"]), str(message["host"])
                rank.group = int(message["group"])
                self._first_at = self._first_at or time.monotonic()
        except (ValueError, KeyError, TypeError):
            self._drop(rank)
            return
        if "doing" in message:
            beat = json.dumps({"step": message["step"], "doing": message["doing"]})
            (self._directory / f"rank_{rank.number}").write_text(beat)
        if "stacks" in message:
            (self._directory / f"stacks_{rank.number}").write_text(message["stacks"])
            rank.has_shown_stacks = True
        if "error" in message:
            rank.has_left = True
            self._error = self._error or f"{_name(rank)}: {message['error']}"
        if "farewell" in message:
            rank.has_left = True
            self.code = message["farewell"] if self.code is None else self.code

    def _drop(self, rank: _Rank) -> None:
        if rank not in self._ranks:  # a stranger, at the first of several lines
            return
        self._ranks.remove(rank)
        self._selector.unregister(rank.connection)
        rank.connection.close()
        if rank.number is not None and not rank.has_left:
            self._death = self._death or f"{_name(rank)} has died"

    def _silent(self, now: float) -> str | None:
        silent = [rank for rank in self._ranks if rank.number is not None and now - rank.heard_at > SILENCE_SECONDS]
        if not silent:
            return None
        why = "it is stopped, or its host or the network to it is down"
        return f"{_name(silent[0])} has been silent for {SILENCE_SECONDS} s: {why}"

    def _missing(self, now: float) -> str | None:
        if self._first_at is None or now - self._first_at < _GATHER_SECONDS:
            return None
        self._first_at = now + 365 * 86400  # asked once
        there = {rank.number for rank in self._ranks}
        missing = [number for number in range(len(self._hosts)) if number not in there]
        if not missing:
            return None
        return f"rank {missing[0]} on {self._hosts[missing[0]]} has not come to life in {_GATHER_SECONDS} s"

    def _tell(self, message: dict) -> None:
        for rank in list(self._ranks):
            with suppress(OSError):  # a line that is broken is noticed where it is read
                rank.connection.send(json.dumps(message).encode() + b"\n")


def _name(rank: _Rank) -> str:
    return f"rank {rank.number} on {rank.host}"


def _receive(connection: socket.socket) -> bytes | None:
    """What has come over a connection; nothing at its end, None where there is no more at the moment."""
    try:
        return connection.recv(1 << 16)
    except BlockingIOError:
        return None
    except OSError:
        return b""
