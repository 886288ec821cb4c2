"""Sinks of metrics. One that cannot be written keeps its rows and retries; it never stops training."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from math import isfinite
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from tinyllama_ds.errors import log
from tinyllama_ds.files import whole_rows, write_durably

_FLUSH_SECONDS = 30.0
_RETRY_SECONDS = 30.0
_PROBE_BYTES = 2**16

Values = Mapping[str, float | str | dict]


def warn(what: object, error: Exception) -> None:
    """Print that something cannot be written; this never fails."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    log(f"{what}: cannot be written ({reason}); continuing, and retrying")


class JsonlWriter:
    """A file of JSON lines, each written at once. What cannot be written is kept, and written with a later row."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Lines of steps after `last_step` are dropped: a resumed run repeats them."""
        self._path = path
        self._pending = b""
        self._is_failing = False
        self._descriptor: int | None = None
        self.last: dict = {}  # row that was there before
        self.last_step = 0  # the largest in the file
        try:
            self.last, self.last_step = _drop_after(path, last_step)
        except OSError as error:
            warn(path, error)

    def write(self, row: dict) -> None:
        """Append a row; a metric that is not finite is null, because JSON has no NaN."""
        bad = [key for key, value in row.items() if isinstance(value, float) and not isfinite(value)]
        self._pending += json.dumps(row | dict.fromkeys(bad), allow_nan=False).encode() + b"\n"
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
            while self._pending:
                self._pending = self._pending[os.write(self._descriptor, self._pending) :]
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                warn(self._path, error)
            self._is_failing = True

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)


def _drop_after(path: Path, step: int) -> tuple[dict, int]:
    """Drop the rows of later steps and what is damaged.

    Returns the last row of the file, and the largest step, which may be that of a different row.
    """
    if not path.exists():
        return {}, 0
    with path.open("rb") as file:
        lines = list(file)
    rows = list(whole_rows(lines, path, step=int))
    kept = [line for line, row in rows if row["step"] <= step]
    if kept != lines:
        write_durably(path, b"".join(kept))
    return (rows[-1][1], max(row["step"] for _, row in rows)) if rows else ({}, 0)


class TensorBoardWriter:
    """TensorBoard's event files in one folder, over one kind of x.

    An event file that failed has a torn end, after which nothing would be read: the rows since its last flush go into
    a new one, which begins by purging what the old one has from there on.
    """

    def __init__(self, directory: Path, last_x: int) -> None:
        """What is there after `last_x` is purged: a resumed run repeats it."""
        self._directory = directory
        self._flushed_x = last_x
        self._rows: list[tuple[int, Values]] = []  # not known to be on the disk
        self._written = 0  # of them, by the current writer
        self._is_failing = False
        self._flush_at = self._retry_at = 0.0
        self._writer: SummaryWriter | None = None
        self._write_rows()

    def write(self, x: int, values: Values) -> None:
        """Write metrics and texts at x, and a dict: charts by category, for TensorBoard's custom scalars."""
        self._rows.append((x, values))
        self._write_rows()

    def close(self) -> None:
        """Make one last attempt for what is not on the disk yet, and close."""
        self._flush_at = self._retry_at = 0.0
        self._write_rows()
        if self._writer is not None:
            with suppress(Exception):  # it was flushed
                self._writer.close()

    def _write_rows(self) -> None:
        if self._writer is None and time.monotonic() < self._retry_at:
            return
        try:
            if self._writer is None:
                _check_writable(self._directory)
                self._writer = SummaryWriter(str(self._directory), purge_step=self._flushed_x + 1)
                self._written = 0
            for x, values in self._rows[self._written :]:
                _write(self._writer, x, values)
                self._written += 1
            if time.monotonic() >= self._flush_at:
                self._flush(self._writer)
        except Exception as error:  # whatever its thread raises
            self._give_up(error)

    def _flush(self, writer: SummaryWriter) -> None:
        writer.flush()
        self._flushed_x = max([self._flushed_x, *(x for x, _ in self._rows)])
        self._rows, self._written = [], 0
        self._flush_at = time.monotonic() + _FLUSH_SECONDS
        self._is_failing = False

    def _give_up(self, error: Exception) -> None:
        if not self._is_failing:
            warn(self._directory, error)
        self._is_failing = True
        self._retry_at = time.monotonic() + _RETRY_SECONDS
        self._writer = None


def _check_writable(directory: Path) -> None:
    """Raise OSError where nothing can be written: TensorBoard would leave an empty file and a traceback each time."""
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / ".probe"
    try:
        probe.write_bytes(bytes(_PROBE_BYTES))
    finally:
        probe.unlink(missing_ok=True)


def _write(writer: SummaryWriter, x: int, values: Values) -> None:
    for name, value in values.items():
        if isinstance(value, str):
            writer.add_text(name, value, x)
        elif isinstance(value, dict):
            writer.add_custom_scalars(value)
        else:
            writer.add_scalar(name, value, x)
