"""Shards against an independent reader of Megatron's documented layout, and against files that were tampered with."""

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from megatron import read_mmididx

from tinyllama_ds.data import shards
from tinyllama_ds.data.shards import IndexHeader, Manifest, ShardName, ShardWriter
from tinyllama_ds.data.stream import TokenStream
from tinyllama_ds.errors import ConfigError

DOCUMENTS = [[5, 6, 7, 2], [2], [9] * 10 + [2], [511, 0, 2]]


def write_shard(
    directory: Path, documents: list[list[int]], vocab_size: int = 512, number: int = 0, shards: int = 1
) -> Path:
    name = ShardName(directory, "source", "train", number, shards)
    writer = ShardWriter(name, vocab_size)
    for document in documents:
        writer.add(np.array(document), np.array([len(document)]))
    writer.commit("0" * 64, "one EOS", {}, [])
    return name.prefix


@pytest.mark.parametrize("documents", [DOCUMENTS, [[2]], []])
@pytest.mark.parametrize(("vocab_size", "dtype"), [(512, "<u2"), (65_536, "<u2"), (65_537, "<i4")])
def test_an_independent_reader_finds_the_documents(
    tmp_path: Path, documents: list[list[int]], vocab_size: int, dtype: str
):
    prefix = write_shard(tmp_path, documents, vocab_size)
    assert read_mmididx(prefix) == documents
    assert IndexHeader.read(prefix.with_suffix(".idx")).dtype == np.dtype(dtype)
    named = Manifest.read(prefix.with_suffix(".json")).dtype
    assert named == np.dtype(dtype).name
    assert np.fromfile(prefix.with_suffix(".bin"), named).tolist() == sum(documents, [])


def test_the_manifest_tells_the_truth(tmp_path: Path):
    prefix = write_shard(tmp_path, DOCUMENTS)
    manifest = Manifest.read(prefix.with_suffix(".json"))
    assert (manifest.tokens, manifest.documents) == (19, 4)
    assert (manifest.smallest_id, manifest.largest_id) == (0, 511)
    assert manifest.bin_sha256 == hashlib.sha256(prefix.with_suffix(".bin").read_bytes()).hexdigest()
    assert manifest.idx_sha256 == hashlib.sha256(prefix.with_suffix(".idx").read_bytes()).hexdigest()


def test_nothing_is_there_before_the_commit_and_nothing_is_left_after_giving_up(tmp_path: Path):
    name = ShardName(tmp_path, "source", "train", 0, 1)
    writer = ShardWriter(name, 512)
    writer.add(np.array([1, 2]), np.array([2]))
    assert not any(name.prefix.with_suffix(suffix).exists() for suffix in (".bin", ".idx", ".json"))
    writer.abandon()
    assert list(name.prefix.parent.iterdir()) == []


@pytest.mark.parametrize("token", [-1, 512])
def test_an_id_beyond_the_vocabulary_is_never_written(tmp_path: Path, token: int):
    writer = ShardWriter(ShardName(tmp_path, "source", "train", 0, 1), 512)
    with pytest.raises(ValueError, match="do not fit a vocabulary of 512"):
        writer.add(np.array([token, 2]), np.array([2]))
    writer.abandon()


@pytest.mark.parametrize("T", [1, 3, 4, 7, 18])
def test_samples_cross_shard_borders_and_cover_every_target_once(tmp_path: Path, T: int):
    parts = [DOCUMENTS[:1], [], DOCUMENTS[1:2], DOCUMENTS[2:]]
    for number, documents in enumerate(parts):
        write_shard(tmp_path, documents, number=number, shards=len(parts))
    stream = TokenStream(tmp_path / "source" / "train")
    tokens = sum(DOCUMENTS, [])
    assert stream.tokens == len(tokens)
    assert stream.num_samples(T) == (len(tokens) - 1) // T
    samples = [stream.sample(index, T).tolist() for index in range(stream.num_samples(T))]
    assert all(len(sample) == T + 1 for sample in samples)
    assert sum((sample[1:] for sample in samples), []) == tokens[1 : 1 + T * len(samples)]
    for start in range(len(tokens)):
        for end in range(start + 1, len(tokens) + 1):
            assert stream.read(start, end - start).tolist() == tokens[start:end]


def test_a_stream_shorter_than_a_sample_has_none(tmp_path: Path):
    write_shard(tmp_path, [[2]])
    stream = TokenStream(tmp_path / "source" / "train")
    for length in (1, 2048):
        with pytest.raises(ConfigError, match=f"tokens are less than one sample of {length + 1} tokens"):
            stream.num_samples(length)


def test_document_starts_come_from_the_index(tmp_path: Path):
    prefix = write_shard(tmp_path, DOCUMENTS)
    assert IndexHeader.read(prefix.with_suffix(".idx")).document_starts().tolist() == [0, 4, 5, 16, 19]


def test_the_documents_that_begin_in_a_stretch_are_found_without_the_whole_index(tmp_path: Path):
    parts = [DOCUMENTS[:1], [], DOCUMENTS[1:2], DOCUMENTS[2:]]
    for number, documents in enumerate(parts):
        write_shard(tmp_path, documents, number=number, shards=len(parts))
    stream = TokenStream(tmp_path / "source" / "train")
    starts = np.array([0, 4, 5, 16])
    for start in range(20):
        for end in range(start, 20):
            expected = starts[(starts >= start) & (starts < end)]
            assert stream.document_starts(start, end - start).tolist() == expected.tolist()


# --- what was tampered with -------------------------------------------------------------------------------------------


def test_a_missing_or_foreign_shard_is_rejected(tmp_path: Path):
    for number in range(3):
        write_shard(tmp_path, DOCUMENTS, number=number, shards=3)
    directory = tmp_path / "source" / "train"
    assert TokenStream(directory).tokens == 57
    manifest = directory / "shard_00001.json"
    content = manifest.read_bytes()
    manifest.unlink()
    with pytest.raises(ConfigError, match="shard 1 is missing; its manifests name 3"):
        TokenStream(directory)
    manifest.write_bytes(content)
    for suffix in (".bin", ".idx", ".json"):
        (directory / "shard_00002").with_suffix(suffix).unlink()
    with pytest.raises(ConfigError, match="shard 2 is missing"):
        TokenStream(directory)


def test_a_manifest_that_does_not_match_is_rejected(tmp_path: Path):
    prefix = write_shard(tmp_path, DOCUMENTS)
    path = prefix.with_suffix(".json")
    good = json.loads(path.read_text())
    for change, message in (
        ({"tokens": 18}, "but its manifest has 18 tokens"),
        ({"documents": 5}, "but its manifest has 5"),
        ({"dtype": "int32"}, r"shard_00000\.idx: its ids are uint16, but its manifest has int32"),
        ({"manifest_version": 9}, "manifest_version is 9; expected 1"),
        ({"unknown": 1}, "not a shard manifest"),
        ({"inputs": [{}]}, "not a shard manifest"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ConfigError, match=message):
            TokenStream(prefix.parent)
    path.write_text(json.dumps({key: value for key, value in good.items() if key != "dtype"}))
    assert TokenStream(prefix.parent).tokens == 19, "as older versions wrote it"
    for content in (b"", b"[]", b"null", b"{", b"\xff", b'{"inputs": 3}'):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="not a shard manifest"):
            TokenStream(prefix.parent)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str):
    prefix = write_shard(tmp_path, DOCUMENTS)
    prefix.with_suffix(suffix).unlink()
    with pytest.raises(ConfigError, match=rf"shard_00000\{suffix}: the shard's \w+ (is|are) missing"):
        TokenStream(prefix.parent)


@pytest.mark.parametrize("length", [0, 1, 20, 37])
def test_a_truncated_bin_is_rejected(tmp_path: Path, length: int):
    prefix = write_shard(tmp_path, DOCUMENTS)
    path = prefix.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ConfigError, match=rf"{length} bytes of uint16, but its manifest has 19 tokens"):
        TokenStream(prefix.parent)


def test_a_bin_cut_while_it_is_read_is_an_error_with_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the storage, so that a run in its middle is started again, and not refused for good."""
    waited: list[float] = []
    monkeypatch.setattr(shards.time, "sleep", waited.append)
    prefix = write_shard(tmp_path, DOCUMENTS)
    stream = TokenStream(prefix.parent)
    path = prefix.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(OSError, match=r"truncated while it was read, at token 8: '.*shard_00000\.bin'"):
        stream.read(8, 5)
    assert waited == [1, 2, 4]


def test_a_read_that_comes_short_for_a_while_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As storage over a network does it: a few bytes at a time, or none until the file is seen as it is."""
    stream = TokenStream(write_shard(tmp_path, DOCUMENTS).parent)
    expected = stream.read(8, 5)
    pread, answers = os.pread, [b"", None]
    monkeypatch.setattr(shards.time, "sleep", lambda _: None)

    def short(descriptor: int, size: int, offset: int) -> bytes:
        answer = answers.pop(0) if answers else None
        return pread(descriptor, min(size, 3), offset) if answer is None else answer

    monkeypatch.setattr(os, "pread", short)
    assert stream.read(8, 5).tolist() == expected.tolist()


def test_every_truncation_of_an_index_is_rejected(tmp_path: Path):
    prefix = write_shard(tmp_path, DOCUMENTS)
    path = prefix.with_suffix(".idx")
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ConfigError, match="shard_00000.idx"):
            IndexHeader.read(path)
    path.write_bytes(content + b"\x00")
    with pytest.raises(ConfigError, match="do not hold"):
        IndexHeader.read(path)


@pytest.mark.parametrize(
    ("sequences", "borders"), [(2**63, 2**63), (2**64 - 1, 0), (2**62, 1), (0, 2**61), (4, 2**60), (2**32, 5)]
)
def test_a_hostile_index_is_rejected_before_anything_is_allocated(tmp_path: Path, sequences: int, borders: int):
    path = tmp_path / "x.idx"
    path.write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, sequences, borders) + b"\x00" * 88)
    with pytest.raises(ConfigError, match="do not hold"):
        IndexHeader.read(path)


@pytest.mark.parametrize(
    ("offset", "value", "message"), [(0, b"X", "not a MMIDIDX"), (9, b"\x02", "version 2"), (17, b"\x09", "code 9")]
)
def test_a_foreign_header_is_rejected(tmp_path: Path, offset: int, value: bytes, message: str):
    prefix = write_shard(tmp_path, DOCUMENTS)
    path = prefix.with_suffix(".idx")
    content = bytearray(path.read_bytes())
    content[offset : offset + 1] = value
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        TokenStream(prefix.parent)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (34, struct.pack("<i", -4), "negative length"),
        (34 + 12 * 4, struct.pack("<q", 1), "document boundaries"),
        (34 + 12 * 4 + 8, struct.pack("<q", -1), "document boundaries"),
        (34 + 12 * 4 + 8, struct.pack("<q", 2**62), "document boundaries"),
        (34 + 12 * 4 + 8 * 4, struct.pack("<q", 9), "document boundaries"),
    ],
)
def test_hostile_contents_of_an_index_are_rejected(tmp_path: Path, offset: int, value: bytes, message: str):
    prefix = write_shard(tmp_path, DOCUMENTS)
    path = prefix.with_suffix(".idx")
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        IndexHeader.read(path).document_starts()


def test_an_index_whose_lengths_do_not_add_up_is_rejected(tmp_path: Path):
    prefix = write_shard(tmp_path, DOCUMENTS)
    path = prefix.with_suffix(".idx")
    content = bytearray(path.read_bytes())
    content[34:38] = struct.pack("<i", 5)
    path.write_bytes(content)
    stream = TokenStream(prefix.parent)
    with pytest.raises(ConfigError, match="counts 20 tokens, but its manifest has 19"):
        _ = stream.shards[0].document_starts


@pytest.mark.parametrize("source", ["../elsewhere", "/etc", "a/b", ".", "..", ".hidden", "--help", ""])
def test_a_source_is_a_folder_of_the_data_directory(source: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected the name of a folder to make in"):
        ShardName(tmp_path, source, "train", 0, 1)
