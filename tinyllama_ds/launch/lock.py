"""One writer per run directory: a lock file that says who holds it."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tinyllama_ds.errors import Refusal

LOCK_FILE = "lock.json"
_REFRESH_SECONDS = 10
_SILENCE_SECONDS = 3 * _REFRESH_SECONDS  # after which an owner on another host counts as dead


class RunLock:
    """The lock that this process holds; to be refreshed, so that other hosts see its owner alive."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._refreshed_at = time.monotonic()

    def refresh(self) -> None:
        """Touch the file now and then."""
        if time.monotonic() - self._refreshed_at >= _REFRESH_SECONDS:
            os.utime(self._path)
            self._refreshed_at = time.monotonic()


@contextmanager
def hold_run(run_dir: Path) -> Iterator[RunLock]:
    """Hold a run directory, making it if need be. Raises `Refusal`, naming the owner, where somebody else does.

    The lock of a dead owner is taken over: on this host one whose process is gone, on another host one who has not
    touched the file while this process watched it for 30 s. No clock is compared with another.
    """
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
    path = run_dir / LOCK_FILE
    ours = json.dumps(_owner())
    while not _create(path, ours):
        held = path.read_text()
        if not _is_dead(path, held):
            owner = json.loads(held)
            raise Refusal(f"{run_dir}: is in use by process {owner['pid']} on host {owner['host']}")
        path.unlink(missing_ok=True)
    try:
        yield RunLock(path)
    finally:
        if path.exists() and path.read_text() == ours:
            path.unlink()


def _owner() -> dict:
    process = psutil.Process()
    return {"pid": process.pid, "host": socket.gethostname(), "started": process.create_time(), "boot": _boot_id()}


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _create(path: Path, content: str) -> bool:
    """A file with its content at once or not at all: link() is atomic, on NFS too."""
    own = path.with_name(f".{path.name}.{os.getpid()}")
    own.write_text(content)
    try:
        path.hardlink_to(own)
    except FileExistsError:
        return False
    finally:
        own.unlink()
    return True


def _is_dead(path: Path, held: str) -> bool:
    owner = json.loads(held)
    if owner["host"] != socket.gethostname():
        return _is_silent(path)
    if owner["boot"] != _boot_id():
        return True
    try:
        return psutil.Process(owner["pid"]).create_time() != owner["started"]
    except psutil.NoSuchProcess:
        return True


def _is_silent(path: Path) -> bool:
    before = path.stat().st_mtime_ns
    time.sleep(_SILENCE_SECONDS)
    return path.exists() and path.stat().st_mtime_ns == before
