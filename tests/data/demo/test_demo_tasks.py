"""The demo task: questions whose right ending is the text's own, from held-out text alone."""

import json
from pathlib import Path

import pytest

from tinyllama_ds.data.demo.tasks import CHOICES, QUESTIONS, make_demo_task
from tinyllama_ds.errors import ConfigError

META = {"meta": {"redpajama_set_name": "RedPajamaC4"}}


def write_corpus(root: Path, words: int) -> str:
    """A corpus whose validation split is one text of numbered words."""
    text = " ".join(f"word{number}" for number in range(words))
    for split, content in (("train", "nothing of this"), ("validation", text)):
        (root / "slimpajama" / split).mkdir(parents=True)
        (root / "slimpajama" / split / "part.jsonl").write_text(json.dumps({"text": content} | META) + "\n")
    return text


def test_the_right_ending_is_the_texts_own_and_no_other_is(tmp_path: Path) -> None:
    text = write_corpus(tmp_path, 20_000)
    task = make_demo_task(tmp_path)
    rows = [json.loads(line) for line in (task.parent / "demo_endings.jsonl").read_text().splitlines()]
    assert len(rows) == QUESTIONS
    for row in rows:
        assert len(set(row["choices"])) == CHOICES
        assert len({tuple(sorted(choice.split())) for choice in row["choices"]}) == 1, "the same words"
        assert [row["question"] + ending in text for ending in row["choices"]].index(True) == row["answer"]
        assert sum(row["question"] + ending in text for ending in row["choices"]) == 1
    places = {row["answer"] for row in rows}
    assert places == set(range(CHOICES)), "the place of the right one gives nothing away"
    before = task.read_bytes()
    assert make_demo_task(tmp_path) == task
    assert task.read_bytes() == before


def test_too_little_text_is_rejected(tmp_path: Path) -> None:
    write_corpus(tmp_path, 71)
    with pytest.raises(ConfigError, match="has no passage of 72 words of held-out text; expected what demo-data has"):
        make_demo_task(tmp_path)
