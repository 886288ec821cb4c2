"""An attacker on a host of a run, with candidates for its key, who tries each of them until the run is over.

`attacker.py ADDRESS PORT GROUP WORDS`, one per line; prints how many greetings were tried and how many accepted.
"""

import json
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from tinyllama_ds.distributed.messages import proof

_AT_ONCE = 100
_FALSE_MESSAGES = (
    {"error": "end it"},
    {"step": 1, "doing": "exiting", "code": 0},
    {"step": 1, "doing": "exiting", "code": 78},
    {"step": 10**6, "doing": "training"},
)


def main(address: str, port: int, group: int, words: list[str]) -> None:
    """Try until the port is closed."""
    tried = let_in = place = 0
    held: list[socket.socket] = []  # open to the end, when a supervisor kills the groups of those that are left
    while True:
        chosen = [words[(place + number) % len(words)] for number in range(_AT_ONCE)]
        try:
            connections = [socket.create_connection((address, port), timeout=5) for _ in chosen]
        except OSError:
            break
        for number, (word, connection) in enumerate(zip(chosen, connections, strict=True), start=place):
            with suppress(OSError):
                log_line(connection, word, rank=number % 3, group=(1, group)[number % 2])
        time.sleep(0.5)
        let_in += sum(is_let_in(connection) for connection in connections)
        held = [*held, *connections][-2 * _AT_ONCE :]
        tried, place = tried + len(chosen), place + _AT_ONCE
    print(json.dumps({"tried": tried, "let in": let_in}))


def log_line(connection: socket.socket, word: str, rank: int, group: int) -> None:
    """Send the greeting of a rank with this word as key and token, and false messages after it."""
    nonce = json.loads(connection.recv(1000))["nonce"]
    greeting = {"rank": rank, "host": "node1", "group": group, "nonce": "n", "token": word}
    greeting["proof"] = proof(word.encode(), "rank", nonce, rank, "node1", group, "n")
    connection.sendall("".join(json.dumps(line) + "\n" for line in (greeting, *_FALSE_MESSAGES)).encode())


def is_let_in(connection: socket.socket) -> bool:
    """Whether the supervisor has sent more than its nonce and kept the connection."""
    connection.settimeout(0.01)
    try:
        return b"proof" in connection.recv(1000)
    except TimeoutError:
        return True
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]).read_text().splitlines())
