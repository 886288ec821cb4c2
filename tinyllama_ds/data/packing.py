"""Documents as samples, packed into rows of T tokens so that none is cut at the end of a row."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllama_ds.config.recipe import BEST_FIT, CONCATENATE
from tinyllama_ds.data.best_fit import Packs, best_fit_decreasing
from tinyllama_ds.data.shards import ShardReader
from tinyllama_ds.data.stream import TokenStream
from tinyllama_ds.errors import ConfigError


def open_stream(directory: Path, packing: str = CONCATENATE) -> TokenStream:
    """The stream of a source's split. Conversations, which are shards with a mask, are packed in any case."""
    stream = TokenStream(directory)
    if not any(shard.has_mask for shard in stream.shards):
        return PackedStream(directory) if packing == BEST_FIT else stream
    if not all(shard.has_mask for shard in stream.shards):
        raise ConfigError(f"{directory}: some of its shards hold conversations and others do not; prepare it again")
    return ConversationStream(directory)


@dataclass(frozen=True)
class Pieces:
    """Documents cut into pieces of up to T tokens, in the order of the stream; a shorter document is one piece."""

    borders: np.ndarray  # first token of each in the stream, and one past the last token (pieces + 1,) int64
    continues: np.ndarray  # whether the next piece is of the same document (pieces,) bool

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each (pieces,) int32."""
        return np.diff(self.borders).astype(np.int32)


@dataclass(frozen=True)
class Rows:
    """The pieces in each row of T tokens."""

    pieces: Pieces
    packs: Packs
    targets: np.ndarray  # labels in the loss (rows,) int64

    def of(self, row: int) -> list[tuple[int, int, bool]]:
        """Start, length and whether it continues of each piece in a row."""
        members = self.packs[row]
        starts, ends = self.pieces.borders[members], self.pieces.borders[members + 1]
        columns = (starts, ends - starts, self.pieces.continues[members])
        return list(zip(*(column.tolist() for column in columns), strict=True))


class PackedStream(TokenStream):
    """Shards whose documents stay whole. Sample i is row i: documents one after the other, and padding.

    A document of more than T tokens is cut into pieces of T, and its last piece is packed as the others. Every token
    but the first of a document is a target exactly once: the last label of a full piece is the next token of its
    document, while the last token of a document predicts nothing, neither the document that happens to come next in
    the row nor padding. (In concatenated rows it predicts the first token of what comes next in the stream.) So a row
    has the loss of its documents alone. Padding repeats the row's last token, as a document of its own.

    Rows depend on the shards and T alone: the same on every rank, in every epoch, after every restart.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._rows: dict[int, Rows] = {}  # by T

    def rows(self, sequence_length: int) -> Rows:
        """All rows of T tokens."""
        if sequence_length not in self._rows:
            pieces = self._cut(self.document_borders(), sequence_length)
            packs = best_fit_decreasing(pieces.lengths, sequence_length)
            self._rows[sequence_length] = Rows(pieces, packs, packs.sums(self._count_targets(pieces)))
        return self._rows[sequence_length]

    def document_borders(self) -> np.ndarray:
        """First token of each document in the stream, and one past the last token (documents + 1,) int64. Imported
        shards may have documents without tokens, which are not among them.
        """
        starts = [shard.document_starts[:-1] + start for shard, start in zip(self.shards, self._starts, strict=False)]
        borders = np.append(np.concatenate(starts), self.tokens)
        return borders if (np.diff(borders) > 0).all() else np.unique(borders)

    def _cut(self, borders: np.ndarray, sequence_length: int) -> Pieces:
        """The pieces of documents, given their borders."""
        lengths = np.diff(borders)
        if lengths.max(initial=0) <= sequence_length:
            return Pieces(borders, np.zeros(len(lengths), dtype=bool))
        counts = -(-lengths // sequence_length)
        first = np.cumsum(counts) - counts  # piece of each document
        within = np.arange(counts.sum()) - np.repeat(first, counts)
        starts = np.repeat(borders[:-1], counts) + within * sequence_length
        return Pieces(np.append(starts, self.tokens), within + 1 < np.repeat(counts, counts))

    def _count_targets(self, pieces: Pieces) -> np.ndarray:
        return pieces.lengths - ~pieces.continues

    def _count_samples(self, sequence_length: int) -> int:
        return len(self.rows(sequence_length).packs)

    def documents(self, index: int, sequence_length: int) -> list[np.ndarray]:
        """The tokens of each document of a row, or of its piece."""
        return [self.read(start, length) for start, length, _ in self.rows(sequence_length).of(index)]

    def sample(self, index: int, sequence_length: int) -> np.ndarray:
        pieces = self.rows(sequence_length).of(index)
        tokens = np.concatenate([self.read(start, length + continues) for start, length, continues in pieces])
        return np.pad(tokens, (0, sequence_length + 1 - len(tokens)), mode="edge")

    def document_ids(self, index: int, sequence_length: int) -> np.ndarray:
        lengths = [length for _, length, _ in self.rows(sequence_length).of(index)]
        numbers = np.arange(len(lengths) + 1, dtype=np.int32)  # the last is the padding's
        return np.repeat(numbers, [*lengths, sequence_length - sum(lengths)])

    @property
    def has_loss_mask(self) -> bool:
        return True

    def loss_mask(self, index: int, sequence_length: int) -> np.ndarray:
        pieces = self.rows(sequence_length).of(index)
        masks = [self._mask_of_labels(start, length, continues) for start, length, continues in pieces]
        mask = np.concatenate(masks)
        return np.pad(mask, (0, sequence_length - len(mask)))

    def _mask_of_labels(self, start: int, length: int, continues: bool) -> np.ndarray:
        """Which of the tokens after each of a piece's are targets (length,) bool."""
        mask = np.ones(length, dtype=bool)
        mask[-1] = continues
        return mask

    def count_targets(self, indices: np.ndarray, sequence_length: int) -> int:
        return int(self.rows(sequence_length).targets[indices].sum())

    def place_in_sample(self, index: int, offset: int, sequence_length: int) -> str:
        for start, length, continues in self.rows(sequence_length).of(index):
            if offset < length + continues:
                return self.place(start + offset)
            offset -= length
        raise IndexError(f"token {offset} behind the documents of sample {index}")


class ConversationStream(PackedStream):
    """Shards of conversations: none is cut, and only the tokens of answers are targets."""

    @property
    def holds_conversations(self) -> bool:
        return True

    def _cut(self, borders: np.ndarray, sequence_length: int) -> Pieces:
        longest = int(np.diff(borders).max(initial=0))
        if longest > sequence_length:
            raise ConfigError(
                f"{self.directory}: holds a conversation of {longest} tokens, more than the {sequence_length} of a"
                f" sample; prepare it with --max-tokens {sequence_length}"
            )
        return super()._cut(borders, sequence_length)

    def _count_targets(self, pieces: Pieces) -> np.ndarray:
        return np.concatenate([_count_answers(shard) for shard in self.shards])

    def _mask_of_labels(self, start: int, length: int, continues: bool) -> np.ndarray:
        number, offset = self._locate(start)  # a conversation is in one shard
        return np.append(self.shards[number].read_mask(offset, length)[1:], False).astype(bool)


def _count_answers(shard: ShardReader) -> np.ndarray:
    """Answer tokens of each conversation of a shard; its first token, which is not a label, is never one."""
    mask, starts = shard.read_mask(0, shard.tokens), shard.document_starts[:-1]
    return np.add.reduceat(mask, starts, dtype=np.int64) if len(starts) else np.zeros(0, dtype=np.int64)
