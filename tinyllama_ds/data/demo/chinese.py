"""Chinese text for the demo, because a Python installation has hardly any: true sentences from a small grammar.

They are about dates (Python's calendar), numbers, and radicals with their English names (Unicode's character database).
It stands in for SkyPile, with few words and fewer constructions.
"""

import random
import unicodedata
from calendar import isleap
from collections.abc import Callable, Iterator
from datetime import date, timedelta

_DIGITS = "零一二三四五六七八九"
_UNITS = ("", "十", "百", "千")
_WEEKDAYS = "一二三四五六日"
_KANGXI_RADICALS = range(0x2F00, 0x2FD6)
_SENTENCES = 40  # of a page


def chinese_pages() -> Iterator[str]:
    """An endless sequence of pages, the same in every call."""
    rng = random.Random("SkyPile")
    writers = (_date, _sum, _comparison, _radical)
    while True:
        yield _page(rng, writers)


def _page(rng: random.Random, writers: tuple[Callable[[random.Random], str], ...]) -> str:
    sentences = [rng.choice(writers)(rng) for _ in range(_SENTENCES)]
    return "\n".join("".join(sentences[start : start + 5]) for start in range(0, _SENTENCES, 5))


def chinese_number(number: int) -> str:
    """A number from 0 to 9,999 in words: 10 is 十, 205 is 二百零五."""
    if number == 0:
        return _DIGITS[0]
    words = ""
    for power, digit in reversed(list(enumerate(map(int, reversed(str(number)))))):
        if digit:
            words += _DIGITS[digit] + _UNITS[power]
        elif words and not words.endswith(_DIGITS[0]):
            words += _DIGITS[0]
    words = words.rstrip(_DIGITS[0])
    return words[1:] if words.startswith("一十") else words


def _date(rng: random.Random) -> str:
    day = date(1900, 1, 1) + timedelta(days=rng.randrange(73_000))
    following = day + timedelta(days=1)
    year = "是闰年，二月有二十九天" if isleap(day.year) else "不是闰年，二月有二十八天"
    return (
        f"{day.year}年{day.month}月{day.day}日是星期{_WEEKDAYS[day.weekday()]}，"
        f"第二天是{following.month}月{following.day}日，星期{_WEEKDAYS[following.weekday()]}。{day.year}年{year}。"
    )


def _sum(rng: random.Random) -> str:
    first, second = rng.randrange(1000), rng.randrange(1000)
    words = (chinese_number(first), chinese_number(second), chinese_number(first + second))
    return "{}加{}等于{}。".format(*words) if rng.random() < 0.5 else "{2}减{1}等于{0}。".format(*words)


def _comparison(rng: random.Random) -> str:
    first, second = sorted(rng.sample(range(10_000), 2))
    return f"{chinese_number(second)}大于{chinese_number(first)}，{chinese_number(first)}小于{chinese_number(second)}。"


def _radical(rng: random.Random) -> str:
    radical = chr(rng.choice(_KANGXI_RADICALS))
    name = unicodedata.name(radical).removeprefix("KANGXI RADICAL ").lower()
    return f"部首“{unicodedata.normalize('NFKC', radical)}”的英文名称是{name}。"
