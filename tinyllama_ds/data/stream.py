"""The concatenated shards of a source, cut into samples."""

from bisect import bisect_right
from pathlib import Path

import numpy as np

from tinyllama_ds.data.shards import Manifest, ShardReader
from tinyllama_ds.errors import ConfigError


class TokenStream:
    """All shards of one source and split as one sequence of tokens, cut into samples of T + 1 tokens.

    Sample i is tokens [iT, iT + T]: stride T with one token of overlap, so that every token but the first is a target
    exactly once. A remainder of less than T tokens at the end is not used.
    """

    def __init__(self, directory: Path) -> None:
        prefixes = sorted(path.with_suffix("") for path in directory.glob("*.json"))
        if not prefixes:
            raise ConfigError(f"{directory}: holds no token shards; expected *.bin, *.idx and *.json made by prepare")
        self.directory = directory
        self.shards = [ShardReader(prefix) for prefix in prefixes]
        self._check_complete()
        self._starts = [0]
        for shard in self.shards:
            self._starts.append(self._starts[-1] + shard.tokens)

    def _check_complete(self) -> None:
        planned = {manifest.shards for manifest in self.manifests}
        held = [manifest.number for manifest in self.manifests]
        if len(planned) != 1 or held != list(range(*planned)):
            missing = sorted(set(range(max(planned))) - set(held))
            what = f"shard {missing[0]} is missing" if missing else f"{len(held)} shards are there"
            raise ConfigError(
                f"{self.directory}: {what}; its manifests name {max(planned)}; run prepare again until it is complete"
            )

    @property
    def tokens(self) -> int:
        return self._starts[-1]

    @property
    def manifests(self) -> list[Manifest]:
        return [shard.manifest for shard in self.shards]

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text in UTF-8 per token, EOS included; None where they are not known, as of imported shards."""
        inputs = [file for manifest in self.manifests for file in manifest.inputs]
        sizes = [file.text_bytes for file in inputs if file.documents]
        return sum(sizes) / self.tokens if sizes and all(sizes) and not self.holds_conversations else None

    def num_samples(self, sequence_length: int) -> int:
        """Samples of T + 1 tokens; raises `ConfigError` where there is not one."""
        count = self._count_samples(sequence_length)
        if count < 1:
            raise ConfigError(
                f"{self.directory}: {self.tokens} tokens are less than one sample of {sequence_length + 1} tokens;"
                " prepare more, or remove the source from the recipe"
            )
        return count

    def _count_samples(self, sequence_length: int) -> int:
        return (self.tokens - 1) // sequence_length

    def sample(self, index: int, sequence_length: int) -> np.ndarray:
        """Sample `index`: T + 1 tokens, which may be in several shards."""
        return self.read(index * sequence_length, sequence_length + 1)

    def document_ids(self, index: int, sequence_length: int) -> np.ndarray:
        """The document number of each of the T input tokens of sample `index`, int32 from 0.

        In a sample that starts inside a document its rest is document 0. The boundaries are from the indexes, so text
        cannot fake one.
        """
        first = index * sequence_length
        is_start = np.zeros(sequence_length, dtype=np.int32)
        is_start[self.document_starts(first + 1, sequence_length - 1) - first] = 1
        return np.cumsum(is_start, dtype=np.int32)

    @property
    def has_loss_mask(self) -> bool:
        """Whether only some labels are targets, as in packed rows, which have padding (`packing.py`)."""
        return False

    @property
    def holds_conversations(self) -> bool:
        """Whether its documents are conversations, of which only the answers are targets."""
        return False

    def loss_mask(self, index: int, sequence_length: int) -> np.ndarray:
        """The loss mask of the T labels of sample `index`, its tokens but the first: (T,) bool."""
        return np.ones(sequence_length, dtype=bool)

    def count_targets(self, indices: np.ndarray, sequence_length: int) -> int:
        """The number of targets of some samples together."""
        return len(indices) * sequence_length

    def place_in_sample(self, index: int, offset: int, sequence_length: int) -> str:
        """Shard file and token offset of a token of a sample, for error messages."""
        return self.place(index * sequence_length + offset)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the stream."""
        pieces = []
        while count > 0:
            number, offset = self._locate(start)
            available = min(count, self._starts[number + 1] - start)
            pieces.append(self.shards[number].read(offset, available))
            start, count = start + available, count - available
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """Positions in [start, start + count) of the stream where a document begins, from the indexes."""
        found = [np.empty(0, dtype=np.int64)]
        end = start + count
        while start < end:
            number, offset = self._locate(start)
            first, following = self._starts[number], min(end, self._starts[number + 1])
            index = self.shards[number].index
            found.append(index.document_starts_between(offset, following - first) + first)
            start = following
        return np.concatenate(found)

    def place(self, position: int) -> str:
        """Shard file and token offset of a stream position, for error messages."""
        number, offset = self._locate(position)
        return f"{self.shards[number].bin_path} at token {offset}"

    def _locate(self, position: int) -> tuple[int, int]:
        """The number of the shard that holds a position of the stream, and the token's place in it."""
        number = bisect_right(self._starts, position) - 1
        return number, position - self._starts[number]
