"""Samples by position in the order of a run, as token arrays."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from tinyllama_ds.config.recipe import CONCATENATE
from tinyllama_ds.data.order import SampleOrder
from tinyllama_ds.data.packing import open_stream
from tinyllama_ds.data.stream import TokenStream
from tinyllama_ds.data.teacher import TeacherCache
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.errors import ConfigError, DataError

MAX_PADDING = 1024  # rows of an embedding beyond the tokenizer's ids


def open_streams(
    data: Path, sources: Iterable[str], split: str, vocab_size: int, packing: str = CONCATENATE
) -> dict[str, TokenStream]:
    """The token streams of all sources of a split, validated against the tokenizer and the model.

    Raises `ConfigError` for a missing source, shards of a tokenizer other than that of `data`, one that does not fit
    the model's vocabulary, and ids beyond it.
    """
    tokenizer = load_tokenizer(data)
    reject_unfit_vocabulary(tokenizer, vocab_size)
    streams = {name: open_stream(data / name / split, packing) for name in sources}
    reject_different_tokenizer(streams, tokenizer)
    for stream in streams.values():
        for shard in stream.shards:
            if shard.manifest.largest_id >= vocab_size:
                raise ConfigError(
                    f"{shard.bin_path}: holds token id {shard.manifest.largest_id},"
                    f" beyond the model's vocabulary of {vocab_size}"
                )
    return streams


def reject_unfit_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises `ConfigError` unless every id of the tokenizer has a row in the model's embedding of `vocab_size` rows.

    Up to `MAX_PADDING` more rows are padding, which many models have for the sake of their shapes: no token is ever an
    input or a target there.
    """
    if not 0 <= vocab_size - tokenizer.vocab_size <= MAX_PADDING:
        raise ConfigError(
            f"{tokenizer.path}: has {tokenizer.vocab_size} pieces, but the model's vocabulary is {vocab_size}; expected"
            f" {tokenizer.vocab_size}, or up to {MAX_PADDING} more as padding"
        )


def reject_different_tokenizer(streams: Mapping[str, TokenStream], tokenizer: Tokenizer) -> None:
    """Raises `ConfigError` unless all tokens were made with this tokenizer."""
    for stream in streams.values():
        for shard in stream.shards:
            if shard.manifest.tokenizer_sha256 != tokenizer.sha256:
                raise ConfigError(f"{shard.bin_path}: was made with a different tokenizer than {tokenizer.path}")


class SampleReader:
    """Reads the samples at given positions of an order."""

    def __init__(
        self,
        streams: Mapping[str, TokenStream],
        order: SampleOrder,
        sequence_length: int,
        vocab_size: int,
        teachers: Mapping[str, TeacherCache] | None = None,
    ) -> None:
        """`teachers` has the predictions for each stream of a student's training."""
        self._streams = [streams[name] for name in order.sources]
        self._teachers = [teachers[name] for name in order.sources] if teachers else []
        self._order = order
        self._sequence_length = sequence_length
        self._vocab_size = vocab_size

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Samples (n, T + 1) int64 at positions (n,): input ids without the last column, labels without the first.

        Raises `DataError` for an id beyond the vocabulary.
        """
        return self._stack(positions, self._sample)

    def read_document_ids(self, positions: np.ndarray) -> np.ndarray:
        """The document number of each input token within its row (n, T) int32, for a document mask."""
        return self._stack(positions, lambda stream, sample: stream.document_ids(sample, self._sequence_length))

    @property
    def has_loss_mask(self) -> bool:
        """Whether some source has a loss mask."""
        return any(stream.has_loss_mask for stream in self._streams)

    def read_loss_mask(self, positions: np.ndarray) -> np.ndarray:
        """The loss mask of the labels (n, T) bool."""
        return self._stack(positions, lambda stream, sample: stream.loss_mask(sample, self._sequence_length))

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher's predictions are known."""
        return bool(self._teachers)

    def read_teacher(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A teacher's token ids (n, T, k) int32 and log-probabilities (n, T, k + 1) fp16."""
        located = self._order.locate(positions)
        pairs = zip(located.source.tolist(), located.sample.tolist(), strict=True)
        records = np.stack([self._teachers[source].read(sample) for source, sample in pairs])
        return records["ids"].astype(np.int32), records["log_probs"].astype(np.float16)

    def count_targets(self, positions: np.ndarray) -> int:
        """The number of targets of all samples together, known without reading them."""
        located = self._order.locate(positions)
        return sum(
            stream.count_targets(located.sample[located.source == number], self._sequence_length)
            for number, stream in enumerate(self._streams)
        )

    def _stack(self, positions: np.ndarray, read: Callable[[TokenStream, int], np.ndarray]) -> np.ndarray:
        located = self._order.locate(positions)
        pairs = zip(located.source.tolist(), located.sample.tolist(), strict=True)
        return np.stack([read(self._streams[source], sample) for source, sample in pairs])

    def _sample(self, stream: TokenStream, sample: int) -> np.ndarray:
        tokens = stream.sample(sample, self._sequence_length).astype(np.int64)
        if tokens.max() >= self._vocab_size or tokens.min() < 0:
            offset = int(np.argmax((tokens >= self._vocab_size) | (tokens < 0)))
            place = stream.place_in_sample(sample, offset, self._sequence_length)
            raise DataError(f"{place}: token id {tokens[offset]} is beyond the vocabulary of {self._vocab_size}")
        return tokens
