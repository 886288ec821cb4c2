"""A demo task for `evaluate`: which of four orders of the last words is that of a held-out text? Chance is a quarter.

The text is from the validation split, so that it is not in the training data, and all four endings have the same words.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from string import Template

from tinyllama_ds.data.prepare.inputs import find_inputs
from tinyllama_ds.data.prepare.reading import read_texts
from tinyllama_ds.data.prepare.sources import source_format
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.outputs import reporting_write_errors, write_file
from tinyllama_ds.shipped import shipped_folder

SOURCE = "slimpajama"
TASK_FILE = "demo_endings.yaml"
QUESTIONS, CHOICES = 100, 4
_QUESTION_WORDS, _ENDING_WORDS = 60, 12
_FEWEST_WORDS = 6  # different ones in an ending


def multiple_choice_task(name: str, data: Path) -> str:
    """A task file of lm-eval for JSON lines of `question`, `choices` and `answer`, the number of the right one."""
    template = Template((shipped_folder("templates") / "multiple_choice.yaml").read_text())
    return template.substitute(name=name, data=json.dumps(str(data.absolute())))


def make_demo_task(corpora: Path) -> Path:
    """Write `corpora/tasks` from the validation split of `corpora/slimpajama`; returns the task file.

    Raises `ConfigError` where the corpus is missing or has too little text.
    """
    output = corpora / "tasks"
    if (output / TASK_FILE).exists():
        return output / TASK_FILE
    fmt = source_format(SOURCE)
    files = find_inputs(corpora / SOURCE, fmt).splits.get("validation", [])
    passages = [passage for path in files for text in read_texts(path, fmt) for passage in _passages(text)]
    if not passages:
        raise ConfigError(
            f"{corpora / SOURCE}: has no passage of {_QUESTION_WORDS + _ENDING_WORDS} words of held-out text; expected"
            " what demo-data has written there"
        )
    rng = random.Random(0)
    rng.shuffle(passages)
    with reporting_write_errors(output):
        output.mkdir(exist_ok=True)
    data = output / "demo_endings.jsonl"
    write_file(data, "".join(json.dumps(question) + "\n" for question in _questions(passages, rng)))
    comment = "# Which of four orders of the last words is the text's own? Made by `tinyllama-ds demo-data --tasks`.\n"
    write_file(output / TASK_FILE, comment + multiple_choice_task("demo_endings", data))
    return output / TASK_FILE


def _passages(text: str) -> Iterator[tuple[str, list[str]]]:
    """The beginning of every passage of the full length, and its last words."""
    words, length = text.split(), _QUESTION_WORDS + _ENDING_WORDS
    for start in range(0, len(words) - length + 1, length):
        question, ending = words[start : start + _QUESTION_WORDS], words[start + _QUESTION_WORDS : start + length]
        if len(set(ending)) >= _FEWEST_WORDS:
            yield " ".join(question), ending


def _questions(passages: list[tuple[str, list[str]]], rng: random.Random) -> Iterator[dict]:
    for question, words in passages[:QUESTIONS]:
        orders = {tuple(words)}
        while len(orders) < CHOICES:
            orders.add(tuple(rng.sample(words, len(words))))
        choices = sorted(" " + " ".join(order) for order in orders)
        rng.shuffle(choices)
        yield {"question": question, "choices": choices, "answer": choices.index(" " + " ".join(words))}
