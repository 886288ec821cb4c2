"""Numbers for the rehearsal of a longer context: told, and told again.

A model of a million tokens knows which tokens are frequent, but does not look for what it has read. The digits of these
numbers follow from the same number before and from nothing else, so that copying is what lowers their loss.
"""

import math
import random
from collections import deque
from collections.abc import Iterator

# The number alone is twice as frequent as the others: it is learned first.
_FORMS = ("{number}", "{number}", "{name} {number}", "{name} is {number}.", "The number of {name} is {number}.")
_NUMBERS = range(100_000, 1_000_000)
_TOLD_AGAIN = 0.85  # of the lines, where the text may have another number
_SHARES_OF_PROSE = (0.3, 0.6, 0.8, 0.9)  # of the lines
_LINE_CHARACTERS = range(20, 100)
_NAME_CHARACTERS = range(4, 9)


def short_texts(prose: str) -> Iterator[str]:
    """Texts of one or two numbers and nothing else, named after words of the prose; as many as it has short lines."""
    rng = random.Random(prose)
    lines, names = _lines_and_names(prose)
    for _ in lines:
        told = _number_lines(names, rng.randint(1, 2), rng)
        size, text = _characters(rng, 100, 260), ""
        while len(text) < size:
            text += next(told)
        yield text


def texts_with_prose(prose: str) -> Iterator[str]:
    """Texts of one number among lines of the prose, which follow each other; until all of its short lines are used."""
    rng = random.Random(prose)
    lines, names = _lines_and_names(prose)
    unused = deque(lines)
    while unused:
        told = _number_lines(names, 1, rng)
        size, share, text = _characters(rng, 130, 2_000), rng.choice(_SHARES_OF_PROSE), ""
        while len(text) < size:
            if unused and rng.random() < share:
                text += unused.popleft() + "\n"
            else:
                text += next(told)
        yield text


def _lines_and_names(prose: str) -> tuple[list[str], list[str]]:
    """The lines of some prose that are short and without digits, and the words in them that can name a number.

    No lines where no word can.
    """
    lines = [line for line in map(str.strip, prose.splitlines()) if _is_plain(line)]
    names = sorted({word for line in lines for word in line.split() if _is_name(word)})
    return lines if names else [], names


def _is_plain(line: str) -> bool:
    return len(line) in _LINE_CHARACTERS and not any(character.isdigit() for character in line)


def _is_name(word: str) -> bool:
    return len(word) in _NAME_CHARACTERS and word.isascii() and word.isalpha() and word.islower()


def _characters(rng: random.Random, fewest: int, most: int) -> float:
    """A length, by chance, as many short as long ones by their logarithm."""
    return math.exp(rng.uniform(math.log(fewest), math.log(most)))


def _number_lines(names: list[str], most: int, rng: random.Random) -> Iterator[str]:
    """Endless lines that tell up to so many numbers; half of the texts do it in one form, half in all of them."""
    forms = [rng.choice(_FORMS)] if rng.random() < 0.5 else _FORMS
    told: dict[str, int] = {}
    while True:
        is_again = len(told) == most or (told and rng.random() < _TOLD_AGAIN)
        name = rng.choice(list(told) if is_again else names)
        number = told.setdefault(name, rng.choice(_NUMBERS))
        yield rng.choice(forms).format(name=name, number=number) + "\n"
