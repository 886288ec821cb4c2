"""Damaged files of data: read, or refused in one sentence, whatever is in them."""

import json
import tempfile
from functools import cache, partial
from pathlib import Path

import fast_folders
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutating import mutations, returns_or_refuses

from tinyllama_ds.data.chat import conversation_ids
from tinyllama_ds.data.prepare.conversations import ChatFormat
from tinyllama_ds.data.prepare.reading import read_records
from tinyllama_ds.data.prepare.sources import SourceFormat, source_format
from tinyllama_ds.data.shards import IndexHeader, InputFile, Manifest, ShardName, ShardWriter
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer


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


TURNS = [("system", "Be brief."), ("user", "Two and two?\n"), ("assistant", "4"), ("user", "Why?"), ("assistant", "é")]
CHAT = json.dumps({"id": 7, "messages": [{"role": role, "content": content} for role, content in TURNS]})
GUANACO = json.dumps({"text": "### Human: hello### Assistant: hello to you### Human: and now?"})
SLIMPAJAMA = json.dumps({"text": "a text", "meta": {"redpajama_set_name": "RedPajamaC4"}})


def prepare_file(path: Path, fmt: SourceFormat, tokenizer: Tokenizer) -> None:
    """As `prepare` does with an input, whatever number of bad records it allows."""
    for record in read_records(path, fmt):
        if record.fault:
            assert str(path) in record.fault
            assert "\n" not in record.fault
            assert len(record.fault) < 1000
        elif record.messages:
            conversation_ids(tokenizer, record.messages)
        elif not record.rejected:
            tokenizer.encode(record.text)


@given(content=mutations(CHAT.encode() + b"\n" + GUANACO.encode() + b"\n"))
def test_a_damaged_chat_file(tokenizer: Tokenizer, content: bytes) -> None:
    returns_or_refuses(lambda path: prepare_file(path, ChatFormat(), tokenizer), content, "chat.jsonl")


@pytest.mark.parametrize("line", [CHAT, GUANACO])
@given(data=st.data())
def test_a_damaged_line_of_chat(tokenizer: Tokenizer, line: str, data: st.DataObject) -> None:
    content = data.draw(mutations(line.encode()))
    returns_or_refuses(lambda path: prepare_file(path, ChatFormat(), tokenizer), content, "chat.jsonl")


@given(content=mutations(SLIMPAJAMA.encode()))
def test_a_damaged_line_of_a_corpus(tokenizer: Tokenizer, content: bytes) -> None:
    fmt = source_format("slimpajama")
    returns_or_refuses(lambda path: prepare_file(path, fmt, tokenizer), content, "corpus.jsonl")


@given(data=st.data())
def test_a_damaged_parquet_file(tokenizer: Tokenizer, data: st.DataObject) -> None:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([json.loads(SLIMPAJAMA)]), sink)
    content = data.draw(mutations(sink.getvalue().to_pybytes()))
    fmt = source_format("slimpajama")
    returns_or_refuses(lambda path: prepare_file(path, fmt, tokenizer), content, "corpus.parquet")


@given(data=st.data())
def test_a_damaged_tokenizer(tokenizer: Tokenizer, data: st.DataObject) -> None:
    content = data.draw(mutations(tokenizer.files["tokenizer.model"]))
    returns_or_refuses(lambda path: load_tokenizer(path).reject_inconvertible(), content, "tokenizer.model")


@cache
def fast_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(fast_folders.smollm2(Path(folder), 280)).files


@given(content=st.deferred(lambda: mutations(fast_files()["tokenizer.json"])))
def test_a_damaged_fast_tokenizer(content: bytes) -> None:
    returns_or_refuses(partial(read_fast, "special_tokens_map.json"), content, "tokenizer.json")


@given(content=st.deferred(lambda: mutations(fast_files()["special_tokens_map.json"])))
def test_damaged_roles_of_special_tokens(content: bytes) -> None:
    returns_or_refuses(partial(read_fast, "tokenizer.json"), content, "special_tokens_map.json")


def read_fast(other: str, path: Path) -> None:
    """Read a tokenizer of two files, of which one is as it should be."""
    path.with_name(other).write_bytes(fast_files()[other])
    try:
        load_tokenizer(path.parent).reject_inconvertible()
    finally:
        path.with_name(other).unlink()
