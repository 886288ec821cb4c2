"""The line to ranks on other hosts: what breaks it, who notices, and who may not take part."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import TIMEOUT, wait_until

from tinyllama_ds.launch import lifeline as module
from tinyllama_ds.launch.lifeline import Lifeline
from tinyllama_ds.training.heartbeat import LIFELINE_VARIABLE

LIFE_SECONDS = 600  # of a rank and its child, where nobody ends them
RANK = """
import sys, time
from tinyllama_ds.training.heartbeat import Heartbeat
heartbeat = Heartbeat(3)
heartbeat.beat(7, "training")
{then}
"""


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Lifeline]:
    lifeline = Lifeline(tmp_path, "127.0.0.1")
    yield lifeline
    lifeline.close()


def start_rank(line: Lifeline, then: str = f"time.sleep({LIFE_SECONDS})") -> subprocess.Popen:
    """A rank with a process group of its own, and a child that stands for the launcher and the other ranks."""
    program = f"import subprocess; subprocess.Popen(['sleep', '{LIFE_SECONDS}'])\n" + RANK.format(then=then)
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {LIFELINE_VARIABLE: line.value},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def look_until(line: Lifeline, path: Path | None = None) -> str | None:
    """What the line says first; nothing where a file is there before it says anything."""
    said: list[str | None] = []

    def happened() -> bool:
        said[:] = [line.look()]
        return bool(said[0]) or (path is not None and path.exists())

    wait_until(happened, "nothing happened")
    return said[0]


def group_is_gone(process: subprocess.Popen) -> bool:
    process.wait(TIMEOUT)
    wait_until(lambda: not is_group(process.pid), "somebody of the group lives on", seconds=LIFE_SECONDS / 2)
    return True


def is_group(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_beats_and_stacks_arrive_as_files(line: Lifeline, tmp_path: Path) -> None:
    process = start_rank(line)
    assert look_until(line, tmp_path / "rank_3") is None
    assert json.loads((tmp_path / "rank_3").read_text()) == {"step": 7, "doing": "training"}
    line.stacks()
    assert "Thread" in (tmp_path / "stacks_3").read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_dead_rank_is_known_at_once(line: Lifeline, tmp_path: Path) -> None:
    process = start_rank(line)
    look_until(line, tmp_path / "rank_3")
    os.killpg(process.pid, signal.SIGKILL)
    assert look_until(line) == f"rank 3 on {socket.gethostname()} has died"
    process.wait()


def test_a_rank_says_why_or_that_it_leaves(line: Lifeline, tmp_path: Path) -> None:
    process = start_rank(line, "heartbeat.fail(OSError('disk'))")
    assert look_until(line) == f"rank 3 on {socket.gethostname()}: OSError: disk"
    process.wait()
    os.killpg(process.pid, signal.SIGKILL)


def test_a_death_comes_before_the_errors_that_it_causes(line: Lifeline, tmp_path: Path) -> None:
    """Also where a sign of life of the dead one has not been read yet, and everything is found at one look."""
    victim = start_rank(line)
    look_until(line, tmp_path / "rank_3")
    (tmp_path / "rank_3").unlink()
    other = start_rank(line, "sys.stdin.read(); heartbeat.fail(OSError('connection closed by peer'))")
    look_until(line, tmp_path / "rank_3")
    connections = [rank.connection for rank in line._ranks]
    wait_until(lambda: select.select(connections, [], [], 0)[0] == connections, "a sign of life of each")
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    other.communicate(timeout=TIMEOUT)
    assert line.look() == f"rank 3 on {socket.gethostname()} has died"
    os.killpg(other.pid, signal.SIGKILL)


def test_a_farewell_is_no_death(line: Lifeline) -> None:
    process = start_rank(line, "heartbeat.farewell(78)")
    wait_until(lambda: line.look() or line.code is not None, "no farewell")
    process.wait()
    assert line.look() is None
    assert line.code == 78
    os.killpg(process.pid, signal.SIGKILL)


def test_a_rank_ends_with_its_whole_host_when_the_supervisor_is_gone(
    line: Lifeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_END_SECONDS", TIMEOUT)
    process = start_rank(line)
    look_until(line, tmp_path / "rank_3")
    assert line.close() == []
    assert group_is_gone(process)


def test_silence_ends_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_SECONDS", 3)
    line = Lifeline(tmp_path, "127.0.0.1")
    process = start_rank(line)
    look_until(line, tmp_path / "rank_3")
    assert group_is_gone(process), "the supervisor has said nothing for 3 s"
    line.close()


def test_a_stopped_rank_is_silent(line: Lifeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start_rank(line)
    look_until(line, tmp_path / "rank_3")
    os.killpg(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(module, "SILENCE_SECONDS", 3)
    assert "has been silent for 3 s: it is stopped, or its host or the network to it is down" in (
        look_until(line) or ""
    )
    assert line.close() == [(socket.gethostname(), process.pid)], "to be killed by other means"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\n",
        b"GET / HTTP/1.1\nHost: here\n\n",
        b'{"token": "guess", "rank": 0, "host": "x"}\n',
        b"[]\n",
        b"1\n",
    ],
)
def test_strangers_are_hung_up_on(line: Lifeline, words: bytes, tmp_path: Path) -> None:
    _, port, *_ = line.value.split(":")
    with socket.create_connection(("127.0.0.1", int(port))) as stranger:
        stranger.sendall(words)
        stranger.settimeout(0.1)
        wait_until(lambda: line.look() or is_hung_up(stranger), "the line is still open")
    assert line.look() is None
    assert list(tmp_path.iterdir()) == []


def is_hung_up(connection: socket.socket) -> bool:
    try:
        return connection.recv(100) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True
