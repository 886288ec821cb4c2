"""Raw corpora as they lie on disk: files of many documents, read one at a time."""

import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet
import zstandard

from tinyllama_ds.errors import Refusal


@dataclass(frozen=True)
class SourceFormat:
    """Where a corpus keeps its text, and which of its records are left out (each with the reason that is counted)."""

    text_field: str = "text"
    excluded_subsets: frozenset[str] = field(default_factory=frozenset)

    def rejection(self, record: dict) -> str | None:
        """Why this record is not trained on, or None."""
        if not record[self.text_field]:
            return "empty text"
        meta = record.get("meta")
        subset = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
        return f"subset {subset}" if subset in self.excluded_subsets else None


# SlimPajama's GitHub part is left out because StarCoderData brings the code (TinyLlama paper, section 2.1).
SOURCES: dict[str, SourceFormat] = {
    "slimpajama": SourceFormat("text", frozenset({"RedPajamaGithub"})),
    "starcoderdata": SourceFormat("content"),
}


def source_format(name: str, text_field: str | None) -> SourceFormat:
    """The format of a published corpus by its name; any other name is a corpus of the user's own with `text_field`."""
    if text_field is not None:
        return SourceFormat(text_field, SOURCES[name].excluded_subsets if name in SOURCES else frozenset())
    return SOURCES.get(name, SourceFormat())


@dataclass(frozen=True)
class Record:
    """One document of a file: its text, or the reason why it is left out."""

    text: str
    rejected: str | None = None


def read_records(path: Path, fmt: SourceFormat) -> Iterator[Record]:
    """All documents of one file, in order, in flat memory.

    Raises `Refusal` with file and line for a record that cannot be read: a corpus is never shortened in silence.
    """
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            yield from reader(path, fmt)
            return
    raise Refusal(f"{path}: unknown kind of file; expected one of {', '.join(READERS)}")


def find_inputs(directory: Path) -> list[Path]:
    """Every readable file below a directory (or the one file named), sorted, so that no order depends on the disk's."""
    if directory.is_file():
        return [directory]
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name.endswith(tuple(READERS)))


def _record(raw: object, fmt: SourceFormat, place: str) -> Record:
    if not isinstance(raw, dict) or not isinstance(raw.get(fmt.text_field), str):
        raise Refusal(f"{place}: expected a record with a string under {fmt.text_field!r}")
    return Record(raw[fmt.text_field], fmt.rejection(raw))


def _read_jsonl(open_file: Callable[[Path], AbstractContextManager[Any]]) -> Callable:
    def read(path: Path, fmt: SourceFormat) -> Iterator[Record]:
        with open_file(path) as file:
            for number, line in enumerate(_lines(file, path), start=1):
                if not line.strip():
                    continue
                try:
                    raw = json.loads(line)
                except ValueError as error:  # covers broken JSON and invalid UTF-8
                    raise Refusal(f"{path}:{number}: not a line of JSON in UTF-8 ({error})") from error
                yield _record(raw, fmt, f"{path}:{number}")

    return read


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except (OSError, EOFError, zstandard.ZstdError) as error:
        raise Refusal(f"{path}: the file is damaged or cut short ({error})") from error


def _open_plain(path: Path) -> AbstractContextManager[BinaryIO]:
    return path.open("rb")


def _open_gzip(path: Path) -> AbstractContextManager[Any]:
    return gzip.open(path, "rb")


class _WholeZstdStream(io.RawIOBase):
    """A zstd stream of any number of frames that reports a frame cut short, which python-zstandard takes for an end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._pending = b""
        self._inside_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            compressed = self._frame.unused_data or self._file.read(1 << 17)
            if self._frame.eof:
                self._frame, self._inside_frame = self._decompressor.decompressobj(), False
            if not compressed:
                if self._inside_frame:
                    raise EOFError("the last zstd frame has no end")
                return 0
            self._pending = self._frame.decompress(compressed)
            self._inside_frame = not self._frame.eof
        count = min(len(buffer), len(self._pending))
        buffer[:count], self._pending = self._pending[:count], self._pending[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_zstd(path: Path) -> AbstractContextManager[Any]:
    return io.BufferedReader(_WholeZstdStream(path), 1 << 20)


def _read_parquet(path: Path, fmt: SourceFormat) -> Iterator[Record]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if fmt.text_field not in file.schema_arrow.names:
                raise Refusal(f"{path}: has no column {fmt.text_field!r}; it has {', '.join(file.schema_arrow.names)}")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[fmt.text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield _record({fmt.text_field: text}, fmt, f"{path}: row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise Refusal(f"{path}: not a readable parquet file ({error})") from error


def _read_text(path: Path, fmt: SourceFormat) -> Iterator[Record]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(f"{path}: not UTF-8 at byte {error.start}") from error
    yield _record({fmt.text_field: text}, fmt, str(path))


READERS: dict[str, Callable[[Path, SourceFormat], Iterator[Record]]] = {
    ".jsonl.zst": _read_jsonl(_open_zstd),
    ".jsonl.gz": _read_jsonl(_open_gzip),
    ".jsonl": _read_jsonl(_open_plain),
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
