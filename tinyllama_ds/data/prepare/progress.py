"""The progress of a preparation, by the files that it writes, on whatever process or host."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

from tinyllama_ds.bars import progress

_POLL_SECONDS = 1.0


class ShardProgress:
    """A bar over tokens that moves while shards are being written, by processes of this host or others.

    `expected` holds the bytes of tokens that each shard to be made will have, by the path of its `.bin`. It is an
    estimate from the size of the inputs; the bar's total follows the actual size of the finished shards.
    """

    def __init__(self, description: str, expected: dict[Path, float], bytes_per_token: int) -> None:
        self._open = dict(expected)
        self._bytes_per_token = bytes_per_token
        self._expected_of_finished = 0.0
        self._finished = 0  # bytes
        self._shards = len(expected)
        self._bar = progress(
            total=self._total(0), desc=description, unit=" tokens", unit_scale=True, disable=not expected, leave=True
        )

    def look(self) -> None:
        """Bring the bar up to date."""
        sizes = {path: size for folder in {path.parent for path in self._open} for path, size in self._sizes(folder)}
        for path in [path for path in self._open if path in sizes]:
            self._finished += sizes[path]
            self._expected_of_finished += self._open.pop(path)
        underway = sum(size for path, size in sizes.items() if path.suffix == ".partial")
        self._bar.total = self._total(underway)
        self._bar.n = (self._finished + underway) // self._bytes_per_token
        self._bar.set_postfix_str(f"{self._shards - len(self._open):,} of {self._shards:,} shards")

    def _total(self, underway: int) -> int:
        scale = self._finished / self._expected_of_finished if self._finished else 1.0
        left = max(scale * sum(self._open.values()), underway)
        return int(self._finished + left) // self._bytes_per_token

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Update the bar from a thread, and once more at the end."""
        ended = Event()
        thread = Thread(target=self._watch, args=(ended,), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.look()
            self._bar.close()

    def _watch(self, ended: Event) -> None:
        while not ended.wait(_POLL_SECONDS):
            self.look()

    def _sizes(self, folder: Path) -> Iterator[tuple[Path, int]]:
        """Token files that were committed since the last look, and those being written, named `.*.bin.*.partial`."""
        for entry in os.scandir(folder) if folder.is_dir() else ():
            path = Path(entry.path)
            if path in self._open or (".bin." in entry.name and path.suffix == ".partial"):
                with suppress(FileNotFoundError):  # renamed or removed in this moment
                    yield path, entry.stat().st_size
