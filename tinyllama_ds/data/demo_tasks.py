"""A demo task for `evaluate`: which of four endings is that of a text that was held out. Chance is a quarter.

The endings are all from held-out texts, so that none is known from training, and are equally many words long.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tinyllama_ds.data.sources import find_inputs, read_texts, source_format
from tinyllama_ds.errors import Refusal

SOURCE = "slimpajama"
TASK_FILE = "demo_endings.yaml"
QUESTIONS, CHOICES = 100, 4
_QUESTION_WORDS, _ENDING_WORDS = 60, 12

_TASK = """# Which of four endings is the text's own? Made by `tinyllama-ds demo-data --tasks`, in lm-eval's format.
task: demo_endings
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def make_demo_task(corpora: Path) -> Path:
    """Write `corpora/tasks` from the validation split of `corpora/slimpajama`; returns the task file.

    Raises `Refusal` where the corpus is missing or has too little text.
    """
    output = corpora / "tasks"
    if (output / TASK_FILE).exists():
        return output / TASK_FILE
    fmt = source_format(SOURCE)
    files = find_inputs(corpora / SOURCE, fmt).get("validation", [])
    passages = [passage for path in files for text in read_texts(path, fmt) for passage in _passages(text)]
    if len(passages) < CHOICES:
        raise Refusal(f"{corpora / SOURCE}: has {len(passages)} passages of held-out text; expected {CHOICES} or more")
    rng = random.Random(0)
    rng.shuffle(passages)
    output.mkdir(exist_ok=True)
    data = output / "demo_endings.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in _questions(passages, rng)))
    (output / TASK_FILE).write_text(_TASK.format(data=json.dumps(str(data.absolute()))))
    return output / TASK_FILE


def _passages(text: str) -> Iterator[tuple[str, str]]:
    """(beginning, ending) of every stretch of text that is long enough."""
    words, length = text.split(), _QUESTION_WORDS + _ENDING_WORDS
    for start in range(0, len(words) - length + 1, length):
        passage = words[start : start + length]
        yield " ".join(passage[:_QUESTION_WORDS]), " " + " ".join(passage[_QUESTION_WORDS:])


def _questions(passages: list[tuple[str, str]], rng: random.Random) -> Iterator[dict]:
    endings = [ending for _, ending in passages]
    for question, ending in passages[:QUESTIONS]:
        choices = [*rng.sample([other for other in endings if other != ending], CHOICES - 1), ending]
        rng.shuffle(choices)
        yield {"question": question, "choices": choices, "answer": choices.index(ending)}
