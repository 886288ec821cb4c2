"""Messages between processes on different hosts: JSON objects, one per line over TCP, and proofs of a shared key."""

import hashlib
import hmac
import json
import socket
import time
from contextlib import suppress
from threading import Lock

from tinyllama_ds.files import Kinds, parse_row

HANDSHAKE_SECONDS = 30  # for the other end to authenticate, and for one message to arrive


class MessageConnection:
    """A TCP connection that carries one JSON object per line in both directions."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._received = b""
        self._sending = Lock()

    def fileno(self) -> int:
        """The file descriptor, for `select`."""
        return self.socket.fileno()

    def send(self, message: dict) -> None:
        """Send a message from any thread; a broken connection is detected when receiving."""
        with self._sending, suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, longest: int, **kinds: Kinds) -> dict | None:
        """The next message of at most `longest` bytes; None if it has not arrived within the socket's timeout.

        Raises ConnectionError at the end of the connection, and for a line that is not an object with values of these
        kinds under these keys.
        """
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        while b"\n" not in self._received:
            if len(self._received) > longest or time.monotonic() > deadline:
                raise ConnectionError(f"sent no message of at most {longest} bytes")
            try:
                received = self.socket.recv(1 << 16)
            except (BlockingIOError, TimeoutError):
                return None
            except OSError:
                received = b""
            if not received:
                raise ConnectionError("closed the connection")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        message = parse_row(line, **kinds)
        if message is None:
            raise ConnectionError("sent an unexpected message")
        return message


def proof(key: bytes, *parts: object) -> str:
    """Shows somebody with the same key that these values come from a process that has it, without revealing it."""
    return hmac.new(key, repr(parts).encode(), hashlib.sha256).hexdigest()


def is_proof(value: object, key: bytes, *parts: object) -> bool:
    """Whether a value is the proof of these parts."""
    return isinstance(value, str) and hmac.compare_digest(value.encode(), proof(key, *parts).encode())
