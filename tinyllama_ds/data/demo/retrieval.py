"""Texts to learn retrieval from, for the demo: numbers told among other text and asked for later.

A model of 10M parameters does not learn to look back from a million tokens of text alone. The words are not those of
`evaluate --suite long-context`, and the numbers are drawn anew.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinyllama_ds.data.demo.corpus import write_columns
from tinyllama_ds.data.needles import NEEDLE, QUESTION, pieces_of
from tinyllama_ds.data.prepare.inputs import find_inputs
from tinyllama_ds.data.prepare.reading import read_texts
from tinyllama_ds.data.prepare.sources import source_format
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.outputs import new_folder

SOURCE = "retrieval"
_FILLER = "slimpajama"
_DOCUMENTS = {"train": 700, "validation": 20}
_CHARACTERS = (200, 6000)  # of a document, up to about 2,000 tokens of the demo tokenizer
_CHARACTERS_PER_QUESTION = 120
_WORDS = (
    "apple", "bridge", "castle", "desert", "eagle", "feather", "guitar", "harbor", "insect", "jungle", "kitten",
    "lemon", "mountain", "napkin", "oyster", "pencil", "quilt", "rabbit", "shadow", "turtle", "urchin", "valley",
)  # fmt: skip


def make_demo_retrieval(corpora: Path) -> dict[str, int]:
    """Write `corpora/retrieval` with text of `corpora/slimpajama` between the numbers; returns documents by split, or
    nothing where it exists already. Raises `ConfigError` where there is no such text.
    """
    root = corpora / SOURCE
    if root.exists():
        return {}
    fmt = source_format(_FILLER)
    splits = find_inputs(corpora / _FILLER, fmt).splits
    texts = {split: [text for path in splits.get(split, []) for text in read_texts(path, fmt)] for split in _DOCUMENTS}
    if not all(texts.values()):
        raise ConfigError(f"{corpora / _FILLER}: lacks text to put numbers into; expected what demo-data writes there")
    with new_folder(root) as folder:
        for split, count in _DOCUMENTS.items():
            rng = random.Random(split)
            write_columns(folder / split / "part.jsonl", {"text": [_document(rng, texts[split]) for _ in range(count)]})
    return {f"{split} documents": count for split, count in _DOCUMENTS.items()}


def _document(rng: random.Random, texts: Sequence[str]) -> str:
    """Some text in which a number is told once, and asked for at later places."""
    low, high = _CHARACTERS
    size = low * (high / low) ** rng.random()  # as many short ones as long ones
    parts = list(_filler(rng, texts, size))
    word, value = rng.choice(_WORDS), rng.randrange(10**5, 10**6)
    told = rng.randrange(len(parts) + 1)
    for _ in range(1 + int(size / _CHARACTERS_PER_QUESTION)):
        parts.insert(rng.randint(told, len(parts)), f"\n{QUESTION.format(word=word)} {value}.\n")
    parts.insert(told, f"\n{NEEDLE.format(word=word, value=value)}\n")
    return "".join(parts).strip()


def _filler(rng: random.Random, texts: Sequence[str], size: float) -> Iterator[str]:
    while size > 0:
        pieces = pieces_of(rng.choice(texts))
        first = rng.randrange(len(pieces))
        for piece in pieces[first : first + 40]:
            if size <= 0:
                return
            size -= len(piece)
            yield piece
