"""Packed rows of running text: documents whole, every token but a document's first a target exactly once."""

from pathlib import Path

import numpy as np
import pytest

from tinyllama_ds.config.recipe import BEST_FIT
from tinyllama_ds.data.packing import PackedStream, open_stream
from tinyllama_ds.data.shards import ShardName, ShardWriter
from tinyllama_ds.errors import ConfigError

SHARDS = [
    [5, 1, 0, 12],
    [],
    [3, 3, 30, 1],
    [16, 8, 0],
]  # lengths of the documents in each; some programs write empty ones


def write_numbered(root: Path, shards: list[list[int]]) -> Path:
    """A source whose tokens are their own places in the stream."""
    first = 0
    for number, lengths in enumerate(shards):
        writer = ShardWriter(ShardName(root, "source", "train", number, len(shards)), 100_000)
        ids = np.arange(first, first + sum(lengths))
        writer.add(ids, np.array(lengths))
        writer.commit("0" * 64, "one EOS", {}, [])
        first += len(ids)
    return root / "source" / "train"


def borders(shards: list[list[int]]) -> list[tuple[int, int]]:
    """First token and one past the last of each document that has tokens."""
    ends = np.cumsum(sum(shards, [])).tolist()
    return [(start, end) for start, end in zip([0, *ends], ends, strict=False) if end > start]


@pytest.mark.parametrize("T", [1, 3, 8, 16, 30, 64])
def test_every_token_but_a_documents_first_is_a_target_once(tmp_path: Path, T: int):
    stream = open_stream(write_numbered(tmp_path, SHARDS), BEST_FIT)
    documents = borders(SHARDS)
    seen, targets = [], []
    for index in range(stream.num_samples(T)):
        tokens, ids, mask = stream.sample(index, T), stream.document_ids(index, T), stream.loss_mask(index, T)
        assert (tokens.shape, ids.shape, mask.shape) == ((T + 1,), (T,), (T,))
        assert stream.count_targets(np.array([index]), T) == mask.sum()
        targets += tokens[1:][mask].tolist()
        assert (tokens[1:][mask] == tokens[:-1][mask] + 1).all(), "labels are the next tokens of the stream"
        is_padding = np.append(False, tokens[1:-1] == tokens[:-2])
        for number in np.unique(ids[~is_padding]):
            piece = tokens[:-1][(ids == number) & ~is_padding]
            assert any(start <= piece[0] and piece[-1] < end for start, end in documents), "one document, one number"
            assert np.array_equal(piece, np.arange(piece[0], piece[-1] + 1))
            seen += piece.tolist()
        assert not mask[is_padding].any()
    assert sorted(seen) == list(range(sum(map(sum, SHARDS)))), "every token is an input once"
    assert sorted(targets) == [place for start, end in documents for place in range(start + 1, end)]


@pytest.mark.parametrize("T", [8, 16, 30])
def test_documents_are_cut_only_where_they_are_longer_than_a_row(tmp_path: Path, T: int):
    stream = open_stream(write_numbered(tmp_path, SHARDS), BEST_FIT)
    assert isinstance(stream, PackedStream)
    held = [piece.tolist() for row in range(stream.num_samples(T)) for piece in stream.documents(row, T)]
    expected = [
        list(range(first, min(first + T, end))) for start, end in borders(SHARDS) for first in range(start, end, T)
    ]
    assert sorted(held) == expected


def test_rows_are_the_same_in_every_process_and_padding_repeats_the_last_token(tmp_path: Path):
    directory = write_numbered(tmp_path, SHARDS)
    first, second = (open_stream(directory, BEST_FIT) for _ in range(2))
    assert first.num_samples(16) == 5  # 16 of 30 | 16 | 14 of 30, 1, 1 | 12, 3, one token of padding | 8, 5, 3
    rows = [first.sample(row, 16).tolist() for row in range(5)]
    assert rows == [second.sample(row, 16).tolist() for row in range(5)]
    assert sorted(16 - len(set(row[:16])) for row in rows) == [0, 0, 0, 0, 1]


def test_concatenation_is_the_default(tmp_path: Path):
    stream = open_stream(write_numbered(tmp_path, SHARDS))
    assert not stream.has_loss_mask
    assert stream.sample(1, 16).tolist() == list(range(16, 33))


def test_a_bad_token_has_its_place_also_behind_a_full_piece(tmp_path: Path):
    stream = open_stream(write_numbered(tmp_path, SHARDS), BEST_FIT)
    for row in range(stream.num_samples(8)):
        for offset, token in enumerate(stream.sample(row, 8).tolist()):
            if offset and token == stream.sample(row, 8)[offset - 1]:
                with pytest.raises(IndexError, match="behind the documents"):
                    stream.place_in_sample(row, offset, 8)
                break
            assert stream.place_in_sample(row, offset, 8) == stream.place(token)


def test_a_source_without_a_token_has_no_row(tmp_path: Path):
    stream = open_stream(write_numbered(tmp_path, [[]]), BEST_FIT)
    with pytest.raises(ConfigError, match="0 tokens are less than one sample of 9 tokens"):
        stream.num_samples(8)
