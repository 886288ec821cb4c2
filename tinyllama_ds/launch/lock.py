"""One writer per run directory: a lock file that names its owner."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import parse_row, sync
from tinyllama_ds.layout import LOCK_FILE

_REFRESH_SECONDS = 10
_SILENCE_SECONDS = 3 * _REFRESH_SECONDS  # after which an owner on another host is considered dead


class RunLock:
    """The lock that this process holds; refreshing it shows other hosts that its owner is alive."""

    def __init__(self, path: Path, ours: bytes) -> None:
        self._path = path
        self._ours = ours
        self._refreshed_at = time.monotonic()

    def refresh(self) -> None:
        """Touch the file every 10 s. Raises `ConfigError` if another process took over the directory."""
        if time.monotonic() - self._refreshed_at < _REFRESH_SECONDS:
            return
        self._refreshed_at = time.monotonic()
        try:
            held = self._path.read_bytes()
        except FileNotFoundError:
            held = None
        except OSError:  # storage that is unreachable for a while
            return
        if held != self._ours:
            by = "a process that removed the lock" if held is None else _describe(self._path, held)
            raise ConfigError(f"{self._path.parent}: was taken over by {by} while this process held it")
        with suppress(OSError):
            os.utime(self._path)


@contextmanager
def hold_run(run_dir: Path) -> Iterator[RunLock]:
    """Lock a run directory, created if missing. Raises `ConfigError` that names the owner if it is locked.

    The lock of a dead owner is taken over: on this host one whose process has ended, on another host one that has not
    touched the file while this process watched it for 30 s. The same goes for a lock that a power loss has damaged. No
    clocks are compared. A directory that was created here and stayed empty, because the start failed, is removed.
    """
    is_new = not run_dir.exists()
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
    path = run_dir / LOCK_FILE
    pid = os.getpid()
    owner = {"pid": pid, "host": socket.gethostname(), "started": _ticks_at_start(pid), "boot": _boot_id()}
    ours = json.dumps(owner).encode()
    while not _create(path, ours):
        with suppress(FileNotFoundError):  # released by its owner at this moment
            held = path.read_bytes()
            if not _is_dead(path, _owner_of(held)):
                raise ConfigError(f"{run_dir}: is in use by {_describe(path, held)}")
            path.unlink()
    try:
        yield RunLock(path, ours)
    finally:
        with suppress(OSError):  # if it stays, it is the lock of a dead process
            if path.read_bytes() == ours:
                path.unlink()
        if is_new:
            with suppress(OSError):  # not empty
                run_dir.rmdir()


def is_held(run_dir: Path) -> bool:
    """Whether a live process holds a run directory; an owner on another host is assumed to be alive.

    A damaged lock does not count: its owner ends when it reads it.
    """
    path = run_dir / LOCK_FILE
    try:
        owner = _owner_of(path.read_bytes())
    except OSError:
        return False
    return owner is not None and (owner["host"] != socket.gethostname() or not _is_dead(path, owner))


def _owner_of(held: bytes) -> dict | None:
    """None if the lock is damaged."""
    return parse_row(held, pid=int, host=str, boot=str, started=int)


def _describe(path: Path, held: bytes) -> str:
    owner = _owner_of(held)
    if owner is None:
        return f"an unknown process, as {path} is damaged,"
    return f"process {owner['pid']} on host {owner['host']}"


def _ticks_at_start(pid: int) -> int | None:
    """The start time of a process in clock ticks since boot, independent of the clock; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # its name may have spaces
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _create(path: Path, content: bytes) -> bool:
    """Create a file with its content atomically: link() is atomic on NFS, too."""
    own = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    own.write_bytes(content)
    sync(own)
    try:
        path.hardlink_to(own)
    except FileExistsError:
        return False
    except OSError:
        return _create_in_place(path, content)  # storage without hard links: GCS FUSE, Blobfuse, SMB, exFAT
    finally:
        own.unlink()
    return True


def _create_in_place(path: Path, content: bytes) -> bool:
    """The same not atomically: others may see an incomplete file, which is treated as damaged."""
    try:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _is_dead(path: Path, owner: dict | None) -> bool:
    if owner is None or owner["host"] != socket.gethostname():
        return _is_silent(path)
    if owner["boot"] != _boot_id():
        return True
    return _ticks_at_start(owner["pid"]) != owner["started"]


def _is_silent(path: Path) -> bool:
    before = path.stat().st_mtime_ns
    time.sleep(_SILENCE_SECONDS)
    return path.stat().st_mtime_ns == before
