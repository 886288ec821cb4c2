"""Sentences with a number to find again, and texts cut into pieces between which such a sentence goes."""

import re

NEEDLE = "The magic number of {word} is {value}."
QUESTION = "What is the magic number of {word}? The magic number of {word} is"
_PIECE = re.compile(r"[^\n]{0,79}\s|[^\n]{1,80}")  # up to a line end, or else a blank


def pieces_of(text: str) -> list[str]:
    """The text in pieces of a line at most, which together are the text."""
    return _PIECE.findall(text)
