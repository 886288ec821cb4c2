"""Conversations as samples, packed into rows of T tokens so that none is cut at the end of a row."""

from bisect import bisect_left, insort
from pathlib import Path

import numpy as np

from tinyllama_ds.data.shards import ShardReader
from tinyllama_ds.data.stream import TokenStream
from tinyllama_ds.errors import ConfigError


def open_stream(directory: Path) -> TokenStream:
    """The stream of a source's split: of conversations where its shards have a mask, else of running text."""
    stream = TokenStream(directory)
    if not any(shard.has_mask for shard in stream.shards):
        return stream
    if not all(shard.has_mask for shard in stream.shards):
        raise ConfigError(f"{directory}: some of its shards hold conversations and others do not; prepare it again")
    return ConversationStream(directory)


class ConversationStream(TokenStream):
    """Shards of conversations. Sample i is pack i, padded with its last token, EOS, which the loss mask excludes.

    Packs depend on the shards and T alone: the same on every rank, in every epoch, after every restart.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._conversations = np.concatenate(
            [shard.document_starts[:-1] + start for shard, start in zip(self.shards, self._starts, strict=False)]
        )
        self._lengths = np.diff(self._conversations, append=self.tokens)
        self._answers = np.concatenate([_count_answers(shard) for shard in self.shards])  # tokens (conversations,)
        self._packs: dict[int, list[list[int]]] = {}  # by T

    def packs(self, sequence_length: int) -> list[list[int]]:
        """The conversations of each row of T tokens."""
        if sequence_length not in self._packs:
            longest = int(self._lengths.max(initial=0))
            if longest > sequence_length:
                raise ConfigError(
                    f"{self.directory}: holds a conversation of {longest} tokens, more than the {sequence_length} of a"
                    f" sample; prepare it with --max-tokens {sequence_length}"
                )
            self._packs[sequence_length] = best_fit_decreasing(self._lengths, sequence_length)
        return self._packs[sequence_length]

    def _count_samples(self, sequence_length: int) -> int:
        return len(self.packs(sequence_length))

    def conversations(self, index: int, sequence_length: int) -> list[np.ndarray]:
        """The tokens of each conversation of a pack."""
        members = self.packs(sequence_length)[index]
        return [self.read(int(self._conversations[one]), int(self._lengths[one])) for one in members]

    def sample(self, index: int, sequence_length: int) -> np.ndarray:
        tokens = np.concatenate(self.conversations(index, sequence_length))
        return np.pad(tokens, (0, sequence_length + 1 - len(tokens)), mode="edge")

    def document_ids(self, index: int, sequence_length: int) -> np.ndarray:
        lengths = self._lengths[self.packs(sequence_length)[index]]
        numbers = np.arange(len(lengths) + 1, dtype=np.int32)  # the last is the padding's
        return np.repeat(numbers, [*lengths, sequence_length - lengths.sum()])

    @property
    def has_loss_mask(self) -> bool:
        return True

    def loss_mask(self, index: int, sequence_length: int) -> np.ndarray:
        members = self.packs(sequence_length)[index]
        mask = [self._read_mask(int(self._conversations[one]), int(self._lengths[one])) for one in members]
        assistant_mask = np.concatenate(mask).astype(bool)
        return np.pad(assistant_mask, (0, sequence_length + 1 - len(assistant_mask)))[1:]

    def count_targets(self, indices: np.ndarray, sequence_length: int) -> int:
        packs = self.packs(sequence_length)
        return sum(int(self._answers[packs[index]].sum()) for index in indices.tolist())

    def place_in_sample(self, index: int, offset: int, sequence_length: int) -> str:
        for one in self.packs(sequence_length)[index]:
            if offset < self._lengths[one]:
                return self.place(int(self._conversations[one]) + offset)
            offset -= int(self._lengths[one])
        raise IndexError(f"token {offset} behind the conversations of sample {index}")

    def _read_mask(self, start: int, count: int) -> np.ndarray:
        """A conversation is in one shard."""
        number, offset = self._locate(start)
        return self.shards[number].read_mask(offset, count)


def _count_answers(shard: ShardReader) -> np.ndarray:
    """Answer tokens of each conversation of a shard; its first token, which is not a label, is never one."""
    mask, starts = shard.read_mask(0, shard.tokens), shard.document_starts[:-1]
    return np.add.reduceat(mask, starts, dtype=np.int64) if len(starts) else np.zeros(0, dtype=np.int64)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items into bins: the longest first, each into the bin with the least sufficient space, or a new bin.

    Needs at most 11/9 of the fewest bins, plus one (Johnson 1973). Equal lengths stay in their order.
    """
    packs: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # free space and pack, sorted, of packs with space for another item
    shortest = int(lengths.min(initial=capacity))
    for item in np.argsort(-lengths, kind="stable").tolist():
        place = bisect_left(open_bins, (int(lengths[item]), -1))
        if place == len(open_bins):
            left, pack = capacity, len(packs)
            packs.append([])
        else:
            left, pack = open_bins.pop(place)
        packs[pack].append(item)
        left -= int(lengths[item])
        if left >= shortest:
            insort(open_bins, (left, pack))
    return packs
