"""What rows of a sequence length do to the documents of a source: how many are cut, and how much is padding."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllama_ds.config.recipe import BEST_FIT
from tinyllama_ds.data.packing import PackedStream, open_stream


@dataclass(frozen=True)
class Cuts:
    """Documents that are in several rows, and their tokens in rows other than that of their beginning."""

    documents: int
    tokens: int


@dataclass(frozen=True)
class PackingAudit:
    """A source in rows of `sequence_length` tokens, concatenated and packed by best fit."""

    source: str
    sequence_length: int
    documents: int
    tokens: int
    longest: int  # tokens of a document
    concatenated: Cuts
    best_fit: Cuts
    rows: int  # of best fit
    padding: int  # tokens in them


def audit_packing(data: Path, source: str, sequence_length: int) -> PackingAudit:
    """Count from the rows that a recipe with this length trains on, and with `packing = "best_fit"` would train on.

    Raises `ConfigError` for a conversation of more tokens, as training does.
    """
    stream = open_stream(data / source / "train", BEST_FIT)
    assert isinstance(stream, PackedStream)
    rows = stream.num_samples(sequence_length)
    borders = stream.document_borders()
    starts, ends = borders[:-1], borders[1:]
    row_ends = (starts // sequence_length + 1) * sequence_length  # of the row of each document's beginning
    lengths = ends - starts
    return PackingAudit(
        source=source,
        sequence_length=sequence_length,
        documents=len(starts),
        tokens=stream.tokens,
        longest=int(lengths.max()),
        concatenated=_cuts(ends - row_ends),
        best_fit=_cuts(lengths - sequence_length),
        rows=rows,
        padding=rows * sequence_length - stream.tokens,
    )


def _cuts(beyond: np.ndarray) -> Cuts:
    """Given how far each document goes beyond the end of its first row."""
    return Cuts(int((beyond > 0).sum()), int(beyond[beyond > 0].sum()))
