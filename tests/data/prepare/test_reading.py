"""Every reader: what was written comes back, and what cannot be read is named with its place."""

import gzip
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from corpora import AWKWARD_TEXTS

from tinyllama_ds.data.prepare import reading
from tinyllama_ds.data.prepare.reading import read_records, read_texts
from tinyllama_ds.data.prepare.sources import SourceFormat
from tinyllama_ds.errors import ConfigError

PLAIN = SourceFormat()


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write_zstd_frames(path: Path, content: bytes, cuts: list[int]) -> None:
    """`content` as several zstd frames, cut anywhere, in the middle of lines and characters too."""
    edges = [0, *cuts, len(content)]
    pieces = [content[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(piece) for piece in pieces))


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> None:
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), path, row_group_size=3)


WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    "x.jsonl": lambda path, texts: path.write_bytes(jsonl(texts)),
    "x.jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(jsonl(texts))),
    "x.jsonl.zst": lambda path, texts: write_zstd_frames(path, jsonl(texts), []),
    "x.parquet": write_parquet,
}


def faults(path: Path, fmt: SourceFormat = PLAIN) -> list[str]:
    return [record.fault for record in read_records(path, fmt) if record.fault]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_back_the_texts_that_were_written(tmp_path: Path, name: str, texts: list[str]):
    WRITERS[name](tmp_path / name, texts)
    assert list(read_texts(tmp_path / name, PLAIN)) == texts
    records = list(read_records(tmp_path / name, PLAIN))
    assert [record.text_bytes for record in records] == [len(text.encode()) for text in texts]


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_a_text_file_is_one_document(tmp_path: Path, text: str):
    (tmp_path / "x.txt").write_bytes(text.encode())
    assert list(read_texts(tmp_path / "x.txt", PLAIN)) == [text]


@pytest.mark.parametrize("frames", [2, 3, 50])
def test_all_frames_of_a_zstd_file_are_read(tmp_path: Path, frames: int, texts: list[str]):
    content = jsonl(texts)
    cuts = sorted(random.Random(frames).sample(range(1, len(content)), frames - 1))
    write_zstd_frames(tmp_path / "x.jsonl.zst", content, cuts)
    assert list(read_texts(tmp_path / "x.jsonl.zst", PLAIN)) == texts


def test_memory_stays_flat_however_large_the_file(tmp_path: Path):
    content = jsonl(["word " * 200_000] * 40)  # 40 MB in lines of 1 MB
    write_zstd_frames(tmp_path / "x.jsonl.zst", content, [])
    tracemalloc.start()
    for _ in read_records(tmp_path / "x.jsonl.zst", PLAIN):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


def test_memory_stays_flat_in_a_row_group_of_the_whole_file(tmp_path: Path):
    rng = random.Random(0)
    texts = [rng.randbytes(1000).hex() for _ in range(20_000)]  # 40 MB that hardly compress
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet")
    assert pyarrow.parquet.read_metadata(tmp_path / "x.parquet").num_row_groups == 1
    before = pyarrow.total_allocated_bytes()
    peak = max(pyarrow.total_allocated_bytes() for _ in read_records(tmp_path / "x.parquet", PLAIN))
    assert peak - before < 8_000_000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "no end', "not a line of JSON in UTF-8"),
        (b"[" * 100_000, "not a line of JSON in UTF-8"),
        (b'{"text": "\xff\xfe"}', "not a line of JSON in UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "not a line of JSON in UTF-8"),
        (b'{"text": "half of a pair: \\ud83d"}', "a lone surrogate at character 16"),
        (b'{"content": "x"}', "expected a record with a text under 'text'"),
        (b'{"text": null}', "expected a record with a text under 'text'"),
        (b'["text"]', "expected a record with a text under 'text'"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, message: str):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}')
    records = list(read_records(path, PLAIN))
    assert [record.text for record in records if not record.fault] == ["one", "two"]
    assert [record.fault.startswith(f"{path}:3: {message}") for record in records if record.fault] == [True]
    with pytest.raises(ConfigError, match=":3: "):
        list(read_texts(path, PLAIN))


def test_a_line_beyond_the_limit_is_named_and_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "MAX_DOCUMENT_BYTES", 1000)
    fits, too_long = "a" * (1000 - len(jsonl([""]))), "b" * 5000
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl([fits, too_long, "after", fits + "a"]))
    records = list(read_records(path, PLAIN))
    assert [record.text for record in records if not record.fault] == [fits, "after"]
    assert faults(path) == [f"{path}:{number}: the line is longer than 1,000 bytes" for number in (2, 4)]
    (tmp_path / "x.txt").write_text(too_long)
    assert faults(tmp_path / "x.txt") == [f"{tmp_path / 'x.txt'}: is one document of more than 1,000 bytes"]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_a_file_cut_short_is_named(tmp_path: Path, name: str, kept: float, texts: list[str]):
    path = tmp_path / name
    WRITERS[name](path, texts)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert len(faults(path)) >= 1
    assert all(str(path) in fault for fault in faults(path))


def test_a_zstd_file_cut_between_two_frames_is_whole(tmp_path: Path):
    """The border of a frame is the only cut that cannot be seen; what comes before it must be complete."""
    first = zstandard.ZstdCompressor().compress(jsonl(["one"]))
    (tmp_path / "x.jsonl.zst").write_bytes(first)
    assert list(read_texts(tmp_path / "x.jsonl.zst", PLAIN)) == ["one"]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
def test_flipped_bytes_never_escape_as_another_error(tmp_path: Path, name: str, texts: list[str]):
    path = tmp_path / name
    WRITERS[name](path, texts)
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        broken = bytearray(whole)
        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        list(read_records(path, PLAIN))  # a fault or a text, but no exception


@pytest.mark.parametrize("name", [*WRITERS, "x.txt"])
def test_an_empty_file_is_a_fault(tmp_path: Path, name: str):
    (tmp_path / name).touch()
    assert faults(tmp_path / name) == [f"{tmp_path / name}: the file is empty"]


def test_an_unknown_kind_of_file_is_rejected(tmp_path: Path):
    with pytest.raises(ConfigError, match="unknown kind of file"):
        list(read_records(tmp_path / "x.docx", PLAIN))


def test_parquet_without_the_column_names_its_columns(tmp_path: Path):
    write_parquet(tmp_path / "x.parquet", ["a"], "body")
    assert faults(tmp_path / "x.parquet") == [f"{tmp_path / 'x.parquet'}: has no column 'text'; it has body"]


def test_parquet_names_the_row_of_a_null_and_of_invalid_utf8(tmp_path: Path):
    path = tmp_path / "x.parquet"
    raw = pyarrow.array([b"fine", None, b"\xff\xfe", b"also fine"], pyarrow.binary())
    strings = pyarrow.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    pyarrow.parquet.write_table(pyarrow.table({"text": strings, "extra": [1, 2, 3, 4]}), path)
    assert [record.text for record in read_records(path, PLAIN) if not record.fault] == ["fine", "also fine"]
    assert [fault.split(": ")[1] for fault in faults(path)] == ["row 2", "row 3"]


# --- as published tools and editors write them ------------------------------------------------------------------------

LINES = b'{"text": "one"}\n{"text": "two"}\n'
BOM = b"\xef\xbb\xbf"
SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18\x04\0\0\0size"


def zstd_of_window(window_log: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(LINES) + compressor.flush()


READ = {
    "byte order mark": ("x.jsonl", BOM + LINES),
    "marks in a joined file": ("x.jsonl", BOM + LINES[:16] + BOM + LINES[16:]),
    "CRLF": ("x.jsonl", LINES.replace(b"\n", b"\r\n")),
    "blank lines": ("x.jsonl", b"\n \n" + LINES.replace(b"\n", b"\n\t\n\r\n") + b"\n"),
    "no last line break": ("x.jsonl", LINES[:-1]),
    "capitals": ("X.JSONL", LINES),
    "C4's names": ("c4-train.0.json.gz", gzip.compress(LINES)),
    "members of gzip": ("x.jsonl.gz", gzip.compress(LINES[:20]) + gzip.compress(LINES[20:])),
    "gzip padded with zeros": ("x.jsonl.gz", gzip.compress(LINES) + bytes(512)),
    "gzip with a mark": ("x.jsonl.gz", gzip.compress(BOM + LINES)),
    "zstd after a skippable frame": ("x.jsonl.zst", SKIPPABLE_FRAME + zstandard.compress(LINES) + SKIPPABLE_FRAME),
    "zstd --long=27": ("x.jsonl.zst", zstd_of_window(27)),
    "unpacked by the download": ("x.jsonl.gz", LINES),
    "packed under a plain name": ("x.jsonl", gzip.compress(LINES)),
    "zstd under the name of gzip": ("x.jsonl.gz", zstandard.compress(LINES)),
    "other keys twice": ("x.jsonl", LINES.replace(b"{", b'{"url": 1, "url": 2, ')),
    "numbers that are none": ("x.jsonl", LINES.replace(b"{", b'{"score": NaN, "other": -Infinity, ')),
}
FAULTY = {
    "UTF-16": ("x.jsonl", LINES.decode().encode("utf-16"), ": the file is in UTF-16; expected UTF-8 (iconv "),
    "UTF-16 text": ("x.txt", "two words".encode("utf-16"), ": the file is in UTF-16; expected UTF-8 (iconv "),
    "Latin-1": ("x.jsonl", b'{"text": "caf\xe9"}', ":1: not a line of JSON in UTF-8 (byte 13 is 0xe9)"),
    "key twice": ("x.jsonl", b'{"text": "a", "text": "b"}', ":1: not a line of JSON in UTF-8 (the key 'text' is given"),
    "an array": ("x.jsonl", b'[{"text": "a"}]', ":1: expected a record with a text under 'text', found an array (jq "),
    "a printed array": ("x.jsonl", b'[\n {"text": "a"}\n]', ":1: is only the beginning of JSON; expected one record a"),
    "printed records": (
        "x.jsonl",
        b'{\r\n "text": "a"\r\n}',
        ":1: is only the beginning of JSON; expected one record a",
    ),
    "encoded twice": (
        "x.jsonl",
        json.dumps('{"text": "a"}').encode(),
        ":1: expected a record with a text under 'text', f",
    ),
    "a number": ("x.jsonl", b'{"text": 1.5}', ":1: expected a record with a text under 'text', which holds a number"),
    "another key": ("x.jsonl", b'{"body": "a", "id": 1}', ", which is not among its keys: 'body', 'id'"),
    "nothing": ("x.jsonl", b"{}", ", which is not among its keys: it has none"),
    "NUL bytes": ("x.jsonl", bytes(4096), ": the file begins with NUL bytes, as after a power loss; copy it again"),
    "NUL bytes at the end": ("x.jsonl", LINES + bytes(512), ":3: holds nothing but NUL bytes, as after a power loss"),
    "LFS": ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer"),
    "xz": ("x.jsonl.gz", b"\xfd7zXZ\0\0\4", ": the file is compressed by xz; expected gzip or zstd (xz -dc FILE"),
    "zip": ("x.jsonl", b"PK\x03\x04\x14\0", ": the file is a zip archive; expected the files in it"),
    "gzip and garbage": (
        "x.jsonl.gz",
        gzip.compress(LINES) + b"garbage",
        "the file is damaged or cut short (Not a gzipped",
    ),
    "zstd and zeros": ("x.jsonl.zst", zstandard.compress(LINES) + bytes(64), "the file is damaged or cut short (ZSTD"),
    "zstd --long=31": ("x.jsonl.zst", zstd_of_window(31), "by zstd with a window of more than 128 MiB; write it again"),
    "a page": ("x.jsonl", b"<!DOCTYPE html>", ":1: not a line of JSON in UTF-8 (Expecting value"),
    "a page for parquet": (
        "x.parquet",
        b"<!DOCTYPE html>\n",
        ": the file is damaged or cut short (Parquet magic bytes",
    ),
    "a mark and no more": ("x.jsonl", BOM, ":1: not a line of JSON in UTF-8 (Expecting value"),
}


@pytest.mark.parametrize("case", READ)
def test_what_tools_write_is_read(tmp_path: Path, case: str):
    name, content = READ[case]
    (tmp_path / name).write_bytes(content)
    assert list(read_texts(tmp_path / name, PLAIN)) == ["one", "two"]


@pytest.mark.parametrize("case", FAULTY)
def test_what_cannot_be_read_is_named_with_its_reason_and_the_remedy(tmp_path: Path, case: str):
    name, content, message = FAULTY[case]
    (tmp_path / name).write_bytes(content)
    assert message in faults(tmp_path / name)[0]
    assert str(tmp_path / name) in faults(tmp_path / name)[0]


def test_a_byte_order_mark_is_no_part_of_a_text_file(tmp_path: Path):
    (tmp_path / "x.TXT").write_bytes(BOM + b"one\r\ntwo")
    assert list(read_texts(tmp_path / "x.TXT", PLAIN)) == ["one\r\ntwo"]


TEXTS = ["one", "two"]


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(TEXTS, pyarrow.large_string()),
        pyarrow.array(TEXTS, pyarrow.string_view()),
        pyarrow.array([b"one", b"two"], pyarrow.binary()),
        pyarrow.array([b"one", b"two"], pyarrow.large_binary()),
        pyarrow.array(TEXTS).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_texts_of_every_type_of_parquet_are_read(tmp_path: Path, column: pyarrow.Array):
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": column}), tmp_path / "x.parquet")
    assert list(read_texts(tmp_path / "x.parquet", PLAIN)) == TEXTS


@pytest.mark.parametrize(
    ("column", "what"),
    [
        (pyarrow.nulls(1), "null"),
        (pyarrow.array([["one"]]), "an array"),
        (pyarrow.array([{"text": "one"}]), "an object"),
        (pyarrow.array([1.5]), "a number"),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_another_type_of_parquet_is_named(tmp_path: Path, column: pyarrow.Array, what: str):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert faults(path) == [f"{path}: row 1: expected a record with a text under 'text', which holds {what}"]


def test_a_column_that_is_there_twice_is_named(tmp_path: Path):
    path = tmp_path / "x.parquet"
    twice = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    assert faults(path) == [f"{path}: has the column 'text' 2 times; expected it once"]


def test_a_parquet_file_without_rows_holds_no_record(tmp_path: Path):
    write_parquet(tmp_path / "x.parquet", [])
    assert list(read_records(tmp_path / "x.parquet", PLAIN)) == []
