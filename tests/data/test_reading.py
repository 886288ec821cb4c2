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

from tinyllama_ds.data import reading
from tinyllama_ds.data.reading import read_records, read_texts
from tinyllama_ds.data.sources import SourceFormat
from tinyllama_ds.errors import Refusal

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
    with pytest.raises(Refusal, match=":3: "):
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


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path):
    with pytest.raises(Refusal, match="unknown kind of file"):
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
