"""The connection to ranks on other hosts: how failures are detected, and who is rejected."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from launching import TIMEOUT, wait_until

from tinyllama_ds.distributed.messages import proof
from tinyllama_ds.distributed.network import free_port
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import read_object_if_whole, read_secret
from tinyllama_ds.launch import lifeline as module
from tinyllama_ds.launch.lifeline import Lifeline
from tinyllama_ds.layout import LIFELINE_KEY_FILE, LIFELINE_VARIABLE

LIFE_SECONDS = 600  # of a rank and its child, unless they are ended
RANK = """
import sys, time
from pathlib import Path
from tinyllama_ds.health.heartbeat import Heartbeat
heartbeat = Heartbeat(int(sys.argv[2]), Path(sys.argv[1]))
heartbeat.beat(7, "training")
{then}
"""


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Lifeline]:
    lifeline = open_line(tmp_path)
    yield lifeline
    lifeline.close()


def open_line(directory: Path, port: int = 0) -> Lifeline:
    """With its key in a run directory next to it."""
    run_dir = directory.with_name(f"{directory.name}_run")
    run_dir.mkdir(exist_ok=True)
    return Lifeline(directory, "127.0.0.1", port, run_dir / LIFELINE_KEY_FILE)


def start_rank(line: Lifeline, then: str = f"time.sleep({LIFE_SECONDS})", rank: int = 3) -> subprocess.Popen:
    """A rank in its own process group, and a child in place of the launcher and the other ranks."""
    program = f"import subprocess; subprocess.Popen(['sleep', '{LIFE_SECONDS}'])\n" + RANK.format(then=then)
    return subprocess.Popen(
        [sys.executable, "-c", program, str(line._key_file.parent), str(rank)],
        env=os.environ | {LIFELINE_VARIABLE: line.value},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def poll_until(line: Lifeline, path: Path | None = None) -> str | None:
    """The first failure; None if a file exists before one is reported."""
    failures: list[str | None] = []

    def happened() -> bool:
        failures[:] = [line.poll()]
        return bool(failures[0]) or (path is not None and path.exists())

    wait_until(happened, "nothing happened")
    return failures[0]


def read_beat(line: Lifeline, rank: int) -> dict:
    """The last progress of a rank as the supervisor sees it."""
    return read_object_if_whole(line._directory / f"rank_{rank}")


def group_is_gone(process: subprocess.Popen) -> bool:
    process.wait(TIMEOUT)
    wait_until(lambda: not is_group(process.pid), "a process of the group is alive", seconds=LIFE_SECONDS / 2)
    return True


def is_group(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_heartbeats_and_stacks_arrive_as_files(line: Lifeline, tmp_path: Path) -> None:
    process = start_rank(line)
    assert poll_until(line, tmp_path / "rank_3") is None
    assert read_beat(line, 3) == {"step": 7, "doing": "training"}
    line.stacks()
    assert "Thread" in (tmp_path / "stacks_3").read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_dead_rank_is_detected_at_once(line: Lifeline, tmp_path: Path) -> None:
    process = start_rank(line)
    poll_until(line, tmp_path / "rank_3")
    os.killpg(process.pid, signal.SIGKILL)
    assert poll_until(line) == f"rank 3 on {socket.gethostname()} has died"
    process.wait()


def test_a_rank_reports_its_error(line: Lifeline, tmp_path: Path) -> None:
    process = start_rank(line, "heartbeat.fail(OSError('disk'))")
    assert poll_until(line) == f"rank 3 on {socket.gethostname()}: OSError: disk"
    process.wait()
    os.killpg(process.pid, signal.SIGKILL)


def test_a_death_comes_before_the_errors_that_it_causes(line: Lifeline, tmp_path: Path) -> None:
    """Also if a heartbeat of the dead one has not been read yet, and one poll reads everything."""
    victim = start_rank(line)
    poll_until(line, tmp_path / "rank_3")
    other = start_rank(line, "sys.stdin.read(); heartbeat.fail(OSError('connection closed by peer'))", rank=4)
    poll_until(line, tmp_path / "rank_4")
    connections = [rank.connection for rank in line._ranks]
    wait_until(lambda: select.select(connections, [], [], 0)[0] == connections, "a heartbeat of each")
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    other.communicate(timeout=TIMEOUT)
    assert line.poll() == f"rank 3 on {socket.gethostname()} has died"
    os.killpg(other.pid, signal.SIGKILL)


def test_a_reported_exit_is_not_a_death(line: Lifeline) -> None:
    process = start_rank(line, "heartbeat.report_exit(78)")
    wait_until(lambda: line.poll() or read_beat(line, 3).get("code"), "no reported exit")
    process.wait()
    assert line.poll() is None
    assert read_beat(line, 3) == {"step": 7, "doing": "exiting", "code": 78}
    os.killpg(process.pid, signal.SIGKILL)


def test_a_rank_ends_with_its_whole_host_when_the_supervisor_is_gone(
    line: Lifeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_END_SECONDS", TIMEOUT)
    process = start_rank(line)
    poll_until(line, tmp_path / "rank_3")
    assert line.close() == []
    assert group_is_gone(process)


def test_silence_ends_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_SECONDS", 3)
    line = open_line(tmp_path)
    process = start_rank(line)
    poll_until(line, tmp_path / "rank_3")
    assert group_is_gone(process), "the supervisor has been silent for 3 s"
    line.close()


def test_a_stopped_rank_is_silent(line: Lifeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start_rank(line)
    poll_until(line, tmp_path / "rank_3")
    os.killpg(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(module, "SILENCE_SECONDS", 3)
    assert "has not responded for 3 s: it is stopped, or its host or the network is down" in (poll_until(line) or "")
    assert line.close() == [(socket.gethostname(), process.pid)], "to be killed by other means"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\n",
        b"GET / HTTP/1.1\nHost: here\n\n",
        b'{"rank": 0, "host": "x", "group": 77, "nonce": "", "proof": "guess"}\n',
        b'{"rank": 0, "host": "x", "group": 77, "nonce": "", "proof": "\xc3\xa9"}\n',
        b'{"rank": 0, "host": "x", "group": 77, "nonce": ""}\n{"step": 1, "doing": "exiting", "code": 0}\n',
        b'{"error": "end it"}\n',
        b"[" * 100_000 + b"\n",
        b" " * 5000,
        b"[]\n",
        b"1\n",
    ],
)
def test_unauthenticated_connections_are_closed(line: Lifeline, words: bytes, tmp_path: Path) -> None:
    _, port, *_ = line.value.split(":")
    with socket.create_connection(("127.0.0.1", int(port))) as rank:
        with suppress(ConnectionError):
            rank.sendall(words)
        rank.settimeout(0.1)
        wait_until(lambda: line.poll() or is_closed(rank), "the connection is still open")
    assert line.poll() is None
    assert list(tmp_path.iterdir()) == []


def is_closed(connection: socket.socket) -> bool:
    """Ignores the nonce with which every connection begins."""
    try:
        while connection.recv(100):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True
    return True


class AuthenticatedClient:
    """A client that has the key and sends any message."""

    def __init__(self, line: Lifeline) -> None:
        self.connection = socket.create_connection(("127.0.0.1", int(line.value.split(":")[1])))
        self.connection.settimeout(0.1)
        self._line = line

    def greet(self, number: object = 3, group: object = 4000, side: str = "rank") -> bool:
        """Whether it is accepted."""
        wait_until(lambda: self._line.poll() or self._reads(), "no nonce")
        theirs = self.nonce
        greeting = {"rank": number, "host": "x", "group": group, "nonce": "n"}
        greeting["proof"] = proof(self._line._key, side, theirs, number, "x", group, "n")
        self.log_line(greeting)
        there = len([rank for rank in self._line._ranks if rank.number is not None])
        wait_until(lambda: self._line.poll() or not [r for r in self._line._ranks if r.number is None], "no answer")
        return len([rank for rank in self._line._ranks if rank.number is not None]) > there

    def log_line(self, message: object) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def _reads(self) -> bool:
        try:
            self.nonce = json.loads(self.connection.recv(1000))["nonce"]
        except TimeoutError:
            return False
        return True


GROUPS = [0, 1, -1, -4000, 2**22, 2**70, True, 2.5, "4000", None, [4000]]


@pytest.mark.parametrize("group", GROUPS, ids=repr)
def test_a_group_that_would_be_all_processes_is_rejected(line: Lifeline, group: object) -> None:
    """The supervisor kills the groups of ranks that do not end: -1 would be all processes of this user."""
    assert not AuthenticatedClient(line).greet(group=group)
    assert line.poll() is None
    assert line.close() == []


@pytest.mark.parametrize("number", [-1, 2, 2**70, True, "0", 0.0, None], ids=repr)
def test_a_rank_outside_the_run_is_rejected(line: Lifeline, number: object) -> None:
    line.expect(["node1", "node2"])
    assert not AuthenticatedClient(line).greet(number)
    assert AuthenticatedClient(line).greet(1)


def test_a_rank_has_one_connection(line: Lifeline) -> None:
    first = AuthenticatedClient(line)
    assert first.greet(1)
    assert not AuthenticatedClient(line).greet(1)
    second = AuthenticatedClient(line)
    assert second.greet(2)
    first.log_line({"step": 7, "doing": "training"})
    wait_until(lambda: line.poll() or (line._directory / "rank_1").exists(), "the first one is not read any more")
    assert line.poll() is None
    second.connection.close()


@pytest.mark.parametrize("code", [1, -9, 255, "0", None, 1e400, [0]], ids=repr)
def test_a_reported_exit_has_the_code_of_a_regular_end(line: Lifeline, code: object) -> None:
    client = AuthenticatedClient(line)
    assert client.greet()
    client.log_line({"doing": 5, "step": []})
    client.log_line({"step": 1, "doing": "exiting", "code": code, "pid": 1})
    wait_until(lambda: line.poll() or read_beat(line, 3), "it is not read any more")
    assert read_beat(line, 3) == {"step": 1, "doing": "exiting"}
    client.connection.close()
    assert poll_until(line) == "rank 3 on x has died"


def test_a_proof_is_of_one_side_and_one_connection(line: Lifeline) -> None:
    """A proof cannot be replayed on a different connection, nor can a rank replay the supervisor's."""
    assert not AuthenticatedClient(line).greet(side="supervisor")
    client = AuthenticatedClient(line)
    wait_until(lambda: line.poll() or client._reads(), "no nonce")
    words = {"rank": 3, "host": "x", "group": 4000, "nonce": "n"}
    words["proof"] = proof(line._key, "rank", client.nonce, 3, "x", 4000, "n")
    other = AuthenticatedClient(line)
    other.log_line(words)
    wait_until(
        lambda: line.poll() or is_closed(other.connection), "it is accepted with the proof of a different connection"
    )


def test_many_unauthenticated_connections_do_not_block_a_rank(line: Lifeline) -> None:
    """Nor do they exhaust the open files of the supervisor."""
    port = int(line.value.split(":")[1])
    many = [socket.create_connection(("127.0.0.1", port)) for _ in range(600)]
    process = start_rank(line)
    assert poll_until(line, line._directory / "rank_3") is None
    assert len(line._ranks) <= module._MAX_UNAUTHENTICATED + 1
    for rank in many:
        rank.close()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_rank_rejects_a_false_supervisor(tmp_path: Path) -> None:
    """A program that listens in its place before it starts neither learns the key nor ends a rank."""
    port = free_port()
    line = open_line(tmp_path)
    line.value = module.lifeline_value("127.0.0.1", port)
    heard = b""
    with socket.create_server(("127.0.0.1", port)) as false:
        process = start_rank(line)
        for words in (b"", b'{"nonce": "0"}\n{"proof": "guess"}\n', b'{"nonce": "0"}\n{"stacks": true}\n{}\n'):
            connection, _ = false.accept()
            with connection, suppress(OSError):  # the rank may have closed it first
                connection.sendall(words)
                connection.shutdown(socket.SHUT_WR)
                heard += connection.recv(1000)
    assert process.poll() is None
    assert line._key not in heard
    line.close()
    line = open_line(tmp_path, port)
    assert poll_until(line, tmp_path / "rank_3") is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    line.close()


def test_the_key_is_for_this_user_alone(line: Lifeline, tmp_path: Path) -> None:
    path = line._key_file
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o600
    assert line._key.decode() not in line.value
    assert read_secret(path) == line._key
    path.chmod(0o640)
    with pytest.raises(PermissionError, match="expected a file that belongs to this user and"):
        read_secret(path)
    line.close()
    assert not path.exists()


def test_storage_without_permissions_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fstat", lambda descriptor: os.stat_result([0o100777, *[0] * 9]))
    with pytest.raises(
        ConfigError, match=r"lifeline\.key: cannot be made private .*; expected storage with permissions"
    ):
        open_line(tmp_path)
    monkeypatch.undo()
    assert not any(path.is_file() for path in tmp_path.with_name(f"{tmp_path.name}_run").iterdir())
