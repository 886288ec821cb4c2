"""Texts of numbers that are told again, for the rehearsal of a longer context."""

import re
from itertools import pairwise

import pytest

from tinyllama_ds.data.demo.numbers import short_texts, texts_with_prose

PROSE = "\n".join(f"The line about {word} is here, and it is short." for word in ("apples", "pears", "plums")) + "\n"
NUMBERS = re.compile(r"\d+")


def numbers_of(text: str) -> list[str]:
    return NUMBERS.findall(text)


@pytest.mark.parametrize(("texts_of", "most"), [(short_texts, 2), (texts_with_prose, 1)])
def test_few_numbers_are_told_again_and_again(texts_of, most: int):
    texts = list(texts_of(PROSE * 100))
    told = [numbers_of(text) for text in texts]
    assert all(len(number) == 6 for numbers in told for number in numbers)
    assert max(len(set(numbers)) for numbers in told) == most
    assert sum(len(numbers) - len(set(numbers)) for numbers in told) > 4 * len(texts)
    assert len({number for numbers in told for number in numbers}) > 0.9 * sum(len(set(numbers)) for numbers in told)


def test_a_name_has_one_number_in_a_text():
    for text in [*short_texts(PROSE * 100), *texts_with_prose(PROSE * 100)]:
        named = re.findall(r"^(?:The number of )?([a-z]+) (?:is )?(\d+)\.?$", text, flags=re.M)
        assert len(dict(named)) == len(set(named))


def test_all_short_lines_of_the_prose_follow_each_other_once():
    long, numbered = "x" * 200, "a line with the digit 7 in it"
    lines = [f"line {'abcdefghij'[n // 10]}{'abcdefghij'[n % 10]} of some prose" for n in range(100)]
    texts = list(texts_with_prose("\n".join([*lines[:50], long, numbered, "short", *lines[50:]])))
    found = [line for text in texts for line in text.splitlines() if not numbers_of(line)]
    assert found == lines
    assert all(len(text) < 2100 for text in texts)
    assert sum(not numbers_of(one) and bool(numbers_of(two)) for one, two in pairwise("".join(texts).splitlines())) > 10


def test_they_are_the_same_in_every_call_and_others_for_other_prose():
    for texts_of in (short_texts, texts_with_prose):
        assert list(texts_of(PROSE)) == list(texts_of(PROSE))
        assert not set(texts_of(PROSE * 20)) & set(texts_of(PROSE * 21))


@pytest.mark.parametrize("prose", ["", "\n\n", "x" * 500, "NO WORD OF LOWER CASE IN IT"])
def test_prose_without_lines_or_names_makes_none(prose: str):
    assert list(short_texts(prose)) == list(texts_with_prose(prose)) == []
