"""Files that survive a power loss as a whole, and tolerant readers of those that did not.

A file that has its name before its content is on the disk may be empty, cut short or full of zeros afterwards.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from tinyllama_ds.errors import log

SECRETS_FILE = "secrets.json"  # of a run directory: variables for ranks on other hosts, while a supervisor is at work
# Of files that a manifest or an index names: no path leads out of their folder.
SAFE_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
Kinds = type | tuple[type, ...]
_MOST = 2**53  # up to which every program that reads JSON keeps whole numbers as they are


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A name next to a file for its unfinished content, unique to this process."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")


class PartialFile:
    """A file to write piece by piece, which `commit` makes durable and visible as a whole under its name."""

    def __init__(self, path: Path, mode: int = 0o666) -> None:
        self._path, self._partial = path, temporary_name(path)
        self._partial.unlink(missing_ok=True)
        self._file = os.fdopen(os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb")

    def write(self, content: bytes) -> None:
        self._file.write(content)

    def commit(self) -> None:
        """Replace a file of that name, if there is one; it is on the disk when this returns. Raises OSError."""
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        self._partial.replace(self._path)
        sync(self._path.parent)

    def abandon(self) -> None:
        """Remove what was written, unless it was committed."""
        with suppress(OSError):  # of what a full disk did not take
            self._file.close()
        self._partial.unlink(missing_ok=True)


def write_durably(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replace a file as a whole: after a crash or a power loss it is the old one or the new one.

    It is on the disk when this returns. Raises OSError, and leaves the old one.
    """
    partial = PartialFile(path, mode)
    try:
        partial.write(content)
        partial.commit()
    finally:
        partial.abandon()


def write_secret(path: Path, content: bytes) -> None:
    """The same with a file that this user alone can read. Raises OSError, also where the storage cannot keep it so."""
    write_durably(path, content, 0o600)
    read_secret(path)


def read_secret(path: Path) -> bytes:
    """The content of such a file. Raises OSError; PermissionError where it is not this user's or others can read it."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise PermissionError(f"{path}: expected a file that belongs to this user and that nobody else can read")
        return file.read()


def write_object(path: Path, content: dict) -> None:
    """The same with a JSON object."""
    write_durably(path, f"{json.dumps(content, indent=1)}\n".encode())


def read_object(path: Path) -> dict | None:
    """The JSON object that a file holds; None where it holds none, because it is damaged. Raises OSError."""
    return _parse(path.read_bytes())


def read_object_if_whole(path: Path) -> dict:
    """The same, or an empty one where there is none that can be read, for callers that continue without it."""
    try:
        return read_object(path) or {}
    except OSError:
        return {}


def whole_rows(lines: Iterable[bytes], path: Path, **kinds: Kinds) -> Iterator[tuple[bytes, dict]]:
    """The lines of a file of JSON lines, each with its object, which has values of these kinds under these keys.

    A line without its end is skipped silently: its writer died, or is about to write the rest. Other lines that do not
    parse are damaged, and reported on the console once all have been read.
    """
    damaged = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            continue
        row = parse_row(line, **kinds)
        if row is None:
            damaged.append(number)
        else:
            yield line, row
    if damaged:
        more = len(damaged) - 1
        rest = f", and so are {more} more line{'s' if more > 1 else ''} of the file" if more else ""
        log(f"{path}:{damaged[0]}: damaged line, skipped{rest}")


def parse_row(line: bytes, **kinds: Kinds) -> dict | None:
    """The object of a JSON line, with values of these kinds under these keys; None for any other line.

    `int` alone is a count: a whole number from 0 on.
    """
    row = _parse(line)
    if row is not None and all(_is(row.get(key), kind) for key, kind in kinds.items()):
        return row
    return None


def _is(value: object, kind: Kinds) -> bool:
    if isinstance(value, int):
        is_in_range = 0 <= value < _MOST if kind is int else abs(value) < _MOST
        return not isinstance(value, bool) and is_in_range and isinstance(value, kind)
    return isinstance(value, kind)


def _parse(text: bytes) -> dict | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
