"""The texts at some positions: what a step of a run trains on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tinyllama_ds.data.order import SampleOrder
from tinyllama_ds.data.packing import PackedStream
from tinyllama_ds.data.stream import TokenStream
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.errors import printable


@dataclass(frozen=True)
class ShownSample:
    """One sample of a run: its origin and its text."""

    position: int  # global sample index, as in the ledger
    source: str
    epoch: int
    sample: int
    place: str  # shard file and first token
    text: str


def show_samples(
    streams: Mapping[str, TokenStream],
    order: SampleOrder,
    positions: range,
    sequence_length: int,
    tokenizer: Tokenizer,
) -> Iterator[ShownSample]:
    """The samples at some positions as text, with a line `--- end of document ---` where a document ends."""
    numbers = np.arange(positions.start, positions.stop)
    located = order.locate(numbers)
    rows = zip(
        order.global_sample_index(numbers).tolist(),
        located.source.tolist(),
        located.epoch.tolist(),
        located.sample.tolist(),
        strict=True,
    )
    for position, number, epoch, sample in rows:
        stream = streams[order.sources[number]]
        if isinstance(stream, PackedStream):
            documents = stream.documents(sample, sequence_length)
        else:
            documents = _documents(stream.sample(sample, sequence_length), tokenizer.eos_id)
        pieces = [tokenizer.decode(piece.tolist()) for piece in documents]
        yield ShownSample(
            position,
            order.sources[number],
            epoch,
            sample,
            stream.place_in_sample(sample, 0, sequence_length),
            printable("\n--- end of document ---\n".join(pieces)),
        )


def _documents(tokens: np.ndarray, eos_id: int) -> list[np.ndarray]:
    pieces = np.split(tokens, np.flatnonzero(tokens == eos_id) + 1)
    return [piece[piece != eos_id] for piece in pieces]
