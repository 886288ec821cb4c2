"""A needle in a haystack: a number, told once at some depth of a long text, has to be chosen at its end.

The haystack is held-out text. Everything follows from a seed, the documents and the tokenizer, in which lengths are
measured.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tinyllama_ds.data.demo.tasks import multiple_choice_task
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.outputs import reporting_write_errors, write_file

CHOICES = 5
DEPTHS = tuple(range(0, 101, 10))  # percent of the haystack before the needle
SEED = 1234
_DIGITS = 6
_WORDS = (
    "anchor", "basket", "candle", "dragon", "engine", "forest", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "mirror", "orange", "pepper", "quartz", "ribbon", "saddle", "temple", "umbrella", "violin", "window",
)  # fmt: skip
_NEEDLE = "The magic number of {word} is {value}."
_QUESTION = "What is the magic number of {word}? The magic number of {word} is"
_PIECE = re.compile(r"[^\n]{0,79}\s|[^\n]{1,80}")  # up to a line end, or else a blank


@dataclass(frozen=True)
class Question:
    """A text of up to `length` tokens with the answer, and the values to choose from."""

    length: int
    depth: int  # percent
    question: str
    choices: tuple[str, ...]
    answer: int  # the number of the right choice


Pieces = list[tuple[str, int]]  # text and tokens


class Haystack:
    """Held-out texts in pieces of a line at most; a needle goes between two of them."""

    def __init__(self, texts: Sequence[str], count_tokens: Callable[[str], int]) -> None:
        """`count_tokens` of a whole text, with what the tokenizer adds to it."""
        self._count = count_tokens
        empty = count_tokens("")
        self._documents: list[Pieces] = [
            [(piece, count_tokens(piece) - empty) for piece in _PIECE.findall(text)] for text in texts
        ]

    def question(self, length: int, depth: int, number: int) -> Question:
        """Question `number` of a length and a depth. Raises `ConfigError` where nothing but the needle would fit."""
        rng = random.Random(f"{SEED} {length} {depth} {number}")
        word = rng.choice(_WORDS)
        choices = tuple(map(str, rng.sample(range(10 ** (_DIGITS - 1), 10**_DIGITS), CHOICES)))
        answer = rng.randrange(CHOICES)
        needle, asked = _NEEDLE.format(word=word, value=choices[answer]), _QUESTION.format(word=word)
        order = rng.sample(range(len(self._documents)), len(self._documents))
        longest = max(choices, key=self._count)
        budget = length - self._count(f"{needle}\n{asked} {longest}")
        while True:
            if budget < 1:
                raise ConfigError(f"length {length} is too short for a needle and its question; expected a longer one")
            text = "\n".join(part for part in (*self._around(needle, depth, order, budget), asked) if part)
            excess = self._count(f"{text} {longest}") - length
            if excess <= 0:
                break
            budget -= excess
        return Question(length, depth, text, choices, answer)

    def _around(self, needle: str, depth: int, order: list[int], budget: int) -> tuple[str, str, str]:
        """Text before the needle, the needle, text after it; in all up to `budget` tokens besides the needle."""
        pieces = list(self._first_pieces(order, budget))
        before, texts = budget * depth / 100, []
        for text, tokens in pieces:
            if before < tokens / 2:
                break
            before -= tokens
            texts.append(text)
        after = "".join(text for text, _ in pieces[len(texts) :])
        return "".join(texts).rstrip(), needle, after.rstrip()

    def _first_pieces(self, order: list[int], budget: int) -> Iterator[tuple[str, int]]:
        """Of documents in some order, again from the first one where they do not suffice."""
        while True:
            before = budget
            for number in order:
                for text, tokens in self._documents[number]:
                    if tokens > budget:
                        return
                    budget -= tokens
                    yield text, tokens
            if budget == before:
                return


def write_tasks(questions: Sequence[Question], folder: Path) -> list[Path]:
    """Task files for lm-eval with their data, one for each length; returns the task files."""
    with reporting_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written = []
    for length in sorted({question.length for question in questions}):
        name, rows = f"needle_{length}", [question for question in questions if question.length == length]
        data = folder / f"{name}.jsonl"
        write_file(data, "".join(json.dumps(asdict(row)) + "\n" for row in rows))
        comment = "# A number told once in a long text. Made by `tinyllama-ds evaluate --suite long-context`.\n"
        written.append(folder / f"{name}.yaml")
        write_file(written[-1], comment + multiple_choice_task(name, data))
    return written
