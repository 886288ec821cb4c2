"""Commands run one after the other or one per host, and a stop request reaches all of them."""

import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path

from launching import wait_until

from tinyllama_ds.errors import EXIT_RESTART
from tinyllama_ds.launch.queue import run_queue


def program(text: str, host: str) -> list[str]:
    return [sys.executable, "-c", text, host]


def test_a_failure_ends_the_queue(tmp_path: Path) -> None:
    begun: list[str] = []
    commands = {name: partial(program, f"raise SystemExit({code})") for name, code in (("a", 0), ("b", 3), ("c", 0))}
    assert run_queue(commands, [""], tmp_path, begun.append) == 3
    assert begun == ["a", "b"]
    assert not list(tmp_path.iterdir())


def test_hosts_share_the_commands(tmp_path: Path) -> None:
    """The first two wait for each other, so they are at work at the same time, each on its own host."""
    meet = """
import os, sys, time
open(os.path.join({folder!r}, sys.argv[1]), "w").close()
while len([name for name in os.listdir({folder!r}) if name.startswith("node")]) < 2: time.sleep(0.01)
print("on", sys.argv[1])
"""
    commands = {name: partial(program, meet.format(folder=str(tmp_path))) for name in ("a", "b", "c")}
    assert run_queue(commands, ["node1", "node2"], tmp_path, lambda name: None) == 0
    said = {name: (tmp_path / f"{name}.log").read_text().strip() for name in "abc"}
    assert (said["a"], said["b"]) == ("on node1", "on node2")
    assert said["c"] in ("on node1", "on node2")


def test_a_stop_request_reaches_the_command_and_nothing_is_started_after_it(tmp_path: Path) -> None:
    ready, begun = tmp_path / "ready", []
    waits = f"""
import pathlib, signal
signal.signal(signal.SIGTERM, lambda *_: exit({EXIT_RESTART}))
pathlib.Path({str(ready)!r}).touch()
signal.pause()
"""

    def stop() -> None:
        wait_until(ready.exists, "the command never started")
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    code = run_queue({name: partial(program, waits) for name in ("a", "b")}, [""], tmp_path, begun.append)
    thread.join()
    assert (code, begun) == (EXIT_RESTART, ["a"])
    assert signal.getsignal(signal.SIGTERM) == before
