"""Files of many documents, as published tools and editors write them, read record by record in constant memory."""

import gzip
import io
import json
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from tinyllama_ds.data.prepare.sources import Record, SourceFormat
from tinyllama_ds.errors import ConfigError

MAX_DOCUMENT_BYTES = 64 * 2**20  # also limits the memory of a decompression bomb
_READ_BYTES = 2**16  # also what is lost before the end of a truncated file
_PARQUET_ROWS = 64  # StarCoderData's rows reach a MB
_HEAD_BYTES = 64
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a byte from 0x50 to 0x5f, which pzstd and others begin a file with
# Formats that are not read: the first bytes, what it is, and how to convert it.
_UNREADABLE = {
    b"version https://git-lfs": "is a Git LFS pointer to the file and not the file; run git lfs pull",
    b"\xfd7zXZ\0": "is compressed by xz; expected gzip or zstd (xz -dc FILE | zstd -o NEW)",
    b"BZh": "is compressed by bzip2; expected gzip or zstd (bzip2 -dc FILE | zstd -o NEW)",
    b"PK\x03\x04": "is a zip archive; expected the files in it",
    BOM_UTF16_LE: "is in UTF-16; expected UTF-8 (iconv -f UTF-16 -t UTF-8 FILE > NEW)",
    BOM_UTF16_BE: "is in UTF-16; expected UTF-8 (iconv -f UTF-16 -t UTF-8 FILE > NEW)",
}
_DAMAGES = {  # by a library's message, a more helpful one
    "Frame requires too much memory": "was compressed by zstd with a window of more than 128 MiB; write it again"
    " without --long (zstd -dc --long=31 FILE | zstd -o NEW)",
}
_OPENINGS = {b"{", b"[", b"[{"}  # lines of JSON with line breaks in a record


def read_texts(path: Path, fmt: SourceFormat) -> Iterator[str]:
    """The texts of one file; raises `ConfigError` at the first fault."""
    for record in read_records(path, fmt):
        if record.fault:
            raise ConfigError(record.fault)
        if not record.rejected:
            yield record.text


def known_suffix(path: Path) -> str:
    """The key of `READERS` that the name of a file ends with; raises `ConfigError` for a file of a different kind."""
    suffix = next(filter(path.name.lower().endswith, READERS), None)
    if suffix is None:
        raise ConfigError(f"{path}: unknown kind of file; expected one of {', '.join(READERS)}")
    return suffix


def read_records(path: Path, fmt: SourceFormat) -> Iterator[Record]:
    """All records of one file, in order, in constant memory. Damage of the file itself is a last record's fault."""
    reader = READERS[known_suffix(path)]
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        what = "is empty" if not head else _unreadable(head)
        if what is not None:
            yield Record(fault=f"{path}: the file {what}")
        else:
            yield from reader(path, fmt)
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        yield Record(fault=f"{path}: the file {_damage(error)}")


def _unreadable(head: bytes) -> str | None:
    if not head.strip(b"\0"):
        return "begins with NUL bytes, as after a power loss; copy it again"
    return next((what for start, what in _UNREADABLE.items() if head.startswith(start)), None)


def _damage(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return f"cannot be read ({error.strerror})"
    text = next(iter(str(error).splitlines()), type(error).__name__)
    return next((what for start, what in _DAMAGES.items() if start in text), f"is damaged or cut short ({text})")


# --- lines of JSON ----------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path, fmt: SourceFormat) -> Iterator[Record]:
    with _open_lines(path) as file:
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                yield _parse(line, fmt, f"{path}:{number}")


def _open_lines(path: Path) -> BinaryIO:
    """By the content of the file, not its name: some download programs decompress, others do not.

    Python's gzip reads all members and skips padding. Arrow reads all frames of zstd and reports a truncated one;
    python-zstandard takes it for the end.
    """
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(_GZIP):
        return gzip.open(path)  # type: ignore[return-value]
    is_zstd = head == _ZSTD or (head[1:] == _ZSTD_SKIPPABLE and 0x50 <= head[0] <= 0x5F)
    stream = pyarrow.input_stream(path, compression="zstd" if is_zstd else None)
    return io.BufferedReader(stream, _READ_BYTES)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines; one that is too long is cut one byte past the limit, and its rest is skipped."""
    while line := file.readline(MAX_DOCUMENT_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_DOCUMENT_BYTES + 1)


def _parse(line: bytes, fmt: SourceFormat, place: str) -> Record:
    if len(line) > MAX_DOCUMENT_BYTES:
        return Record(fault=f"{place}: the line is longer than {MAX_DOCUMENT_BYTES:,} bytes")
    try:
        # An editor puts a byte order mark before a file, and joining files puts it before other lines, too.
        text = line.removeprefix(BOM_UTF8).strip().decode()
        raw = _decoder(fmt.keys).decode(text)
    except UnicodeDecodeError as error:
        return Record(
            fault=f"{place}: not a line of JSON in UTF-8 (byte {error.start} is {error.object[error.start]:#x})"
        )
    except (ValueError, RecursionError) as error:
        return Record(fault=f"{place}: {_not_json(line, error)}")
    return fmt.record(raw, place)


def _not_json(line: bytes, error: Exception) -> str:
    if not line.strip(b"\0\r\n"):
        return "holds nothing but NUL bytes, as after a power loss"
    if line.strip() in _OPENINGS:
        return (
            "is only the beginning of JSON; expected one record a line (jq -c . FILE writes them so, .[] of an array)"
        )
    return f"not a line of JSON in UTF-8 ({error})"


@lru_cache
def _decoder(keys: frozenset[str]) -> json.JSONDecoder:
    """Python's takes the last of two values of one key; here a duplicate key that is read is an error."""

    def unite(pairs: list[tuple[str, object]]) -> dict[str, object]:
        united = dict(pairs)
        if len(united) < len(pairs):
            names = [name for name, _ in pairs if name in keys]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"the key {twice!r} is given twice")
        return united

    return json.JSONDecoder(object_pairs_hook=unite)


# --- parquet and text -------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, fmt: SourceFormat) -> Iterator[Record]:
    # Without these two a row group, which may be the whole file, is read at once.
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES) as file:
        names = file.schema_arrow.names
        columns = fmt.columns(names)
        twice = next((name for name in columns if names.count(name) > 1), None)
        if twice is not None:
            yield Record(fault=f"{path}: has the column {twice!r} {names.count(twice)} times; expected it once")
            return
        if not columns:
            yield Record(fault=f"{path}: has no column {fmt.expected_columns}; it has {', '.join(names)}")
            return
        row = 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            for values in zip(*(batch.column(name) for name in columns), strict=True):
                row += 1
                yield _parse_row(dict(zip(columns, values, strict=True)), fmt, f"{path}: row {row}")


def _parse_row(row: dict[str, pyarrow.Scalar], fmt: SourceFormat, place: str) -> Record:
    try:
        values = {name: value.as_py() for name, value in row.items()}
        if isinstance(text := values.get(fmt.text_field), bytes):  # some programs write texts as binary
            values[fmt.text_field] = text.decode()
        return fmt.record(values, place)
    except UnicodeDecodeError as error:
        return Record(fault=f"{place}: not UTF-8 at byte {error.start}")


def _read_text(path: Path, fmt: SourceFormat) -> Iterator[Record]:
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        yield Record(fault=f"{path}: is one document of more than {MAX_DOCUMENT_BYTES:,} bytes")
        return
    try:
        yield fmt.record({fmt.text_field: path.read_bytes().removeprefix(BOM_UTF8).decode()}, str(path))
    except UnicodeDecodeError as error:
        yield Record(fault=f"{path}: not UTF-8 at byte {error.start}")


READERS: dict[str, Callable[[Path, SourceFormat], Iterator[Record]]] = {
    ".jsonl.zst": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl": _read_jsonl,
    ".json.zst": _read_jsonl,  # C4's name for lines of JSON
    ".json.gz": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
