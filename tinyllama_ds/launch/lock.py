"""One writer per run directory: a lock file that says who holds it."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tinyllama_ds.errors import Refusal

LOCK_FILE = "lock.json"
_REFRESH_SECONDS = 10
_SILENCE_SECONDS = 3 * _REFRESH_SECONDS  # after which an owner on another host counts as dead


class RunLock:
    """The lock that this process holds; to be refreshed, so that other hosts see its owner alive."""

    def __init__(self, path: Path, ours: str) -> None:
        self._path = path
        self._ours = ours
        self._refreshed_at = time.monotonic()

    def refresh(self) -> None:
        """Touch the file now and then. Raises `Refusal` where somebody took the directory over, who thought us dead."""
        if time.monotonic() - self._refreshed_at < _REFRESH_SECONDS:
            return
        held = self._path.read_text() if self._path.exists() else "{}"
        if held != self._ours:
            raise Refusal(f"{self._path.parent}: was taken over by {_name(held)} while this process held it")
        os.utime(self._path)
        self._refreshed_at = time.monotonic()


@contextmanager
def hold_run(run_dir: Path) -> Iterator[RunLock]:
    """Hold a run directory, making it if need be. Raises `Refusal`, naming the owner, where somebody else does.

    The lock of a dead owner is taken over: on this host one whose process is gone, on another host one who has not
    touched the file while this process watched it for 30 s. No clock is compared with another. A directory made
    here that stayed empty, because the start was refused, goes again.
    """
    is_new = not run_dir.exists()
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
    path = run_dir / LOCK_FILE
    ours = json.dumps(_owner())
    while not _create(path, ours):
        with suppress(FileNotFoundError):  # its owner lets go of it in this moment
            held = path.read_text()
            if not _is_dead(path, held):
                raise Refusal(f"{run_dir}: is in use by {_name(held)}")
            path.unlink()
    try:
        yield RunLock(path, ours)
    finally:
        if path.exists() and path.read_text() == ours:
            path.unlink()
        if is_new:
            with suppress(OSError):  # there is something in it
                run_dir.rmdir()


def is_held(run_dir: Path) -> bool:
    """Whether somebody alive holds a run directory; of an owner on another host that is taken for granted."""
    path = run_dir / LOCK_FILE
    try:
        held = path.read_text()
    except FileNotFoundError:
        return False
    return json.loads(held)["host"] != socket.gethostname() or not _is_dead(path, held)


def _name(held: str) -> str:
    owner = json.loads(held)
    return f"process {owner['pid']} on host {owner['host']}" if owner else "nobody, who removed the lock,"


def _owner() -> dict:
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "started": _ticks_at_start(pid), "boot": _boot_id()}


def _ticks_at_start(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot, which no change of the clock moves; None without it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # its name can hold anything
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _create(path: Path, content: str) -> bool:
    """A file with its content at once or not at all: link() is atomic, on NFS too."""
    own = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
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
    return _ticks_at_start(owner["pid"]) != owner["started"]


def _is_silent(path: Path) -> bool:
    before = path.stat().st_mtime_ns
    time.sleep(_SILENCE_SECONDS)
    return path.stat().st_mtime_ns == before
