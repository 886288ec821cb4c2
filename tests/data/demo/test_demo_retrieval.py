"""The demo's texts to learn retrieval from: each number is told once, before every question that asks for it."""

import json
import re
from pathlib import Path

import pytest
from conftest import made_up_text

from tinyllama_ds.data.demo.retrieval import make_demo_retrieval
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.evaluation.long_context.needle import WORDS

META = {"meta": {"redpajama_set_name": "RedPajamaC4"}}
TOLD = re.compile(r"\nThe magic number of (\w+) is (\d{6})\.\n")
ASKED = re.compile(r"\nWhat is the magic number of (\w+)\? The magic number of (\w+) is (\d{6})\.\n")


def write_corpus(root: Path) -> None:
    for number, split in enumerate(("train", "validation")):
        rows = [{"text": made_up_text(number * 10 + seed, 400)} | META for seed in range(3)]
        (root / "slimpajama" / split).mkdir(parents=True)
        (root / "slimpajama" / split / "part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_question_has_its_number_before_it_and_words_are_not_those_of_the_evaluation(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    counts = make_demo_retrieval(tmp_path)
    sizes, words = [], set()
    for split in ("train", "validation"):
        rows = [json.loads(row) for row in (tmp_path / "retrieval" / split / "part.jsonl").read_text().splitlines()]
        assert len(rows) == counts[f"{split} documents"]
        for text in (f"\n{row['text']}\n" for row in rows):
            [told], asked = TOLD.findall(text), ASKED.findall(text)
            assert asked
            assert set(asked) == {(told[0], told[0], told[1])}
            assert TOLD.search(text).start() < ASKED.search(text).start()  # type: ignore[union-attr]
            sizes.append(len(text))
            words.add(told[0])
    assert max(sizes) > 10 * min(sizes)
    assert not words & set(WORDS)
    assert make_demo_retrieval(tmp_path) == {}, "it is there already"


def test_no_text_to_put_numbers_into_is_rejected(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / "slimpajama/validation/part.jsonl").unlink()
    with pytest.raises(
        ConfigError, match=r"slimpajama: lacks text to put numbers into; expected what demo-data writes"
    ):
        make_demo_retrieval(tmp_path)
