"""Samples: the right tokens at the right position."""

from pathlib import Path

import numpy as np
import pytest
from corpora import made_up_text, write_jsonl

from tinyllama_ds.data.loader import SampleReader, open_streams
from tinyllama_ds.data.order import MixtureStage, SampleOrder
from tinyllama_ds.data.prepare.prepare import Preparation, prepare
from tinyllama_ds.data.prepare.sources import source_format
from tinyllama_ds.data.stream import TokenStream
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.train_tokenizer import EOS_ID, train_tokenizer
from tinyllama_ds.errors import ConfigError, DataError

T = 64


def make_data(root: Path, tokenizer: Tokenizer, corpora: dict[str, list[list[str]]]) -> Path:
    """A data directory of several sources, each of several files and as many shards."""
    for source, files in corpora.items():
        for number, documents in enumerate(files):
            write_jsonl(root / "raw" / source / f"{number}.jsonl", documents)
        fmt = source_format(source)
        prepare(Preparation(source, root / "raw" / source, fmt, tokenizer.path, root / "data", shard_bytes=1))
    return root / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    root = tmp_path_factory.mktemp("loader")
    corpora = {
        "first": [[made_up_text(file * 10 + number, 150) for number in range(5)] for file in range(3)],
        "second": [[made_up_text(100 + number, 80) for number in range(4)]],
    }
    return make_data(root, tokenizer, corpora)


def reader_of(data: Path, sources: list[str], samples: int, vocab_size: int = 512) -> tuple[SampleReader, SampleOrder]:
    streams = open_streams(data, sources, "train", vocab_size)
    sizes = {name: stream.num_samples(T) for name, stream in streams.items()}
    order = SampleOrder(1, sizes, [MixtureStage(samples, dict.fromkeys(sources, 1.0))])
    return SampleReader(streams, order, T, vocab_size), order


def test_a_batch_is_the_tokens_that_the_order_names(data: Path):
    reader, order = reader_of(data, ["first", "second"], 40)
    batch = reader.read(np.arange(5, 25))
    assert batch.shape == (20, T + 1)
    assert batch.dtype == np.int64
    located = order.locate(np.arange(5, 25))
    whole = [
        np.concatenate([np.fromfile(path, "<u2") for path in sorted((data / name / "train").glob("*.bin"))])
        for name in ("first", "second")
    ]
    for row, source, sample in zip(batch, located.source, located.sample, strict=True):
        assert np.array_equal(row, whole[source][sample * T : sample * T + T + 1])


def test_every_token_but_the_first_is_a_target_exactly_once(data: Path):
    stream = TokenStream(data / "first" / "train")
    reader, _ = reader_of(data, ["first"], stream.num_samples(T))
    targets = reader.read(np.arange(stream.num_samples(T)))[:, 1:].ravel()
    assert stream.tokens - 1 - len(targets) < T
    expected = stream.read(1, len(targets))
    assert np.array_equal(np.sort(targets), np.sort(expected))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_ranks_read_disjoint_samples_that_make_up_the_epoch(data: Path, world_size: int):
    samples = TokenStream(data / "first" / "train").num_samples(T) // 24 * 24
    reader, _ = reader_of(data, ["first"], samples)
    positions = np.arange(samples).reshape(-1, world_size, 24 // world_size)
    rows = [reader.read(positions[:, rank].ravel()) for rank in range(world_size)]
    assert sorted(map(bytes, np.concatenate(rows))) == sorted(map(bytes, reader.read(np.arange(samples))))
    assert len(set(map(bytes, np.concatenate(rows)))) == samples


def test_segments_count_the_documents_of_a_row(data: Path):
    """Against the end-of-document tokens themselves, which only prepare can write."""
    reader, _ = reader_of(data, ["first", "second"], 60)
    tokens = reader.read(np.arange(60))[:, :-1]
    ended = np.cumsum(tokens == EOS_ID, axis=1)
    expected = np.concatenate((np.zeros((60, 1), dtype=int), ended[:, :-1]), axis=1)
    document_ids = reader.read_document_ids(np.arange(60))
    assert document_ids.shape == (60, T)
    assert np.array_equal(document_ids, expected)
    assert document_ids.max() > 0  # and not because there was nothing to see


def test_one_document_in_one_shard_is_enough(tmp_path: Path, tokenizer: Tokenizer):
    data = make_data(tmp_path, tokenizer, {"tiny": [[made_up_text(1, 60)]]})
    reader, _ = reader_of(data, ["tiny"], 8)
    assert reader.read(np.arange(8)).shape == (8, T + 1)


def test_an_id_beyond_the_vocabulary_is_rejected_with_its_place(tmp_path: Path, tokenizer: Tokenizer):
    data = make_data(tmp_path, tokenizer, {"bad": [[made_up_text(1, 300)]]})
    (path,) = (data / "bad" / "train").glob("*.bin")
    tokens = np.fromfile(path, "<u2")
    tokens[70] = 65_535
    tokens.tofile(path)
    reader, _ = reader_of(data, ["bad"], 10)
    with pytest.raises(
        DataError, match=r"shard_00000\.bin at token 70: token id 65535 is beyond the vocabulary of 512"
    ):
        reader.read(np.arange(10))


def test_what_does_not_fit_together_is_rejected(tmp_path: Path, data: Path, tokenizer: Tokenizer):
    with pytest.raises(ConfigError, match="has 512 pieces, but the model's vocabulary is 32000; expected 512"):
        open_streams(data, ["first"], "train", 32_000)
    with pytest.raises(ConfigError, match="holds no token shards"):
        open_streams(data, ["absent"], "train", 512)
    other = make_data(tmp_path, tokenizer, {"first": [[made_up_text(1, 60)]]})
    train_tokenizer([made_up_text(99, 3000)], 512, other / "tokenizer.model")
    with pytest.raises(ConfigError, match="was made with a different tokenizer"):
        open_streams(other, ["first"], "train", 512)
