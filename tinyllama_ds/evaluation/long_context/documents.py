"""Held-out documents that are long enough, from their first token on: a position is a distance from that token."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllama_ds.data.loader import open_streams
from tinyllama_ds.errors import ConfigError

_SPLIT = "validation"


@dataclass(frozen=True)
class LongDocument:
    """The first tokens of a document."""

    source: str
    ids: np.ndarray  # (N,) int64


def read_long_documents(data: Path, tokens: int, most: int, vocab_size: int) -> list[LongDocument]:
    """The first `tokens` tokens of held-out documents that have as many, of all sources of a data directory.

    At most `most` documents, evenly from all that there are. Conversations are excluded, as only their answers are
    targets. Raises `ConfigError` where no document is long enough.
    """
    sources = sorted(path.parent.parent.name for path in data.glob(f"*/{_SPLIT}/shard_00000.json"))
    if not sources:
        raise ConfigError(f"{data}: holds no {_SPLIT} split; expected a data directory made by prepare")
    found, longest = [], 0
    for source, stream in open_streams(data, sources, _SPLIT, vocab_size).items():
        for shard in [] if stream.holds_conversations else stream.shards:
            starts = shard.document_starts
            lengths = np.diff(starts)
            longest = max(longest, int(lengths.max(initial=0)))
            found += [(source, shard, int(start)) for start in starts[:-1][lengths >= tokens]]
    if not found:
        raise ConfigError(
            f"{data}: its longest held-out document has {longest:,} tokens; expected {tokens:,}, as the longest of"
            " --lengths, or shorter --lengths"
        )
    count = min(most, len(found))
    chosen = [found[number * len(found) // count] for number in range(count)]
    return [LongDocument(source, shard.read(start, tokens).astype(np.int64)) for source, shard, start in chosen]
