"""Damaged manifests and indices: read, or refused in one sentence, whatever is in them."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from mutating import mutations, returns_or_refuses

from tinyllama_ds.data.shards import IndexHeader, InputFile, Manifest, ShardName, ShardWriter
from tinyllama_ds.data.sources import source_format


@cache
def shard() -> dict[str, bytes]:
    """The files of a shard of three documents, by suffix."""
    with tempfile.TemporaryDirectory() as folder:
        name = ShardName(Path(folder), "mine", "train", 0, 1)
        writer = ShardWriter(name, vocab_size=512)
        writer.add(np.array([5, 6, 2, 7, 2, 2], dtype=np.int64), np.array([3, 2, 1]))
        entry = InputFile("a.jsonl", 100, 5, 3, {"empty text": 1}, ["a.jsonl:3: bad"], 40, "gigatoken")
        writer.commit("0" * 64, "one EOS", source_format("slimpajama").to_dict(), [entry])
        return {suffix: name.prefix.with_suffix(suffix).read_bytes() for suffix in (".json", ".idx")}


def of_shard(suffix: str) -> st.SearchStrategy[bytes]:
    return st.deferred(lambda: mutations(shard()[suffix]))


@given(content=of_shard(".json"))
def test_a_damaged_manifest(content: bytes) -> None:
    returns_or_refuses(Manifest.read, content, "shard_00000.json")


@given(content=of_shard(".idx"))
def test_a_damaged_index(content: bytes) -> None:
    returns_or_refuses(read_index, content, "shard_00000.idx")


def read_index(path: Path) -> None:
    header = IndexHeader.read(path)
    header.document_starts_between(0, 6)
    header.document_starts()
