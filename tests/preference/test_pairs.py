"""Preferences as JSON lines."""

import json
from pathlib import Path

import pytest
from chats import turns

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.preference.pairs import read_pairs

QUESTION = turns("what is a shard?", "a file", "and a token?")
PAIR = {
    "prompt": QUESTION,
    "chosen": [{"role": "assistant", "content": "a number"}],
    "rejected": [{"role": "assistant", "content": "a llama"}],
}


def written(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def test_both_forms_are_the_same(tmp_path: Path) -> None:
    whole = {key: QUESTION + PAIR[key] for key in ("chosen", "rejected")}
    text = whole | {"prompt": "what is a shard?", "score_chosen": 8.0}  # as UltraFeedback is published
    assert read_pairs(written(tmp_path / "p.jsonl", PAIR, whole, text)) == [PAIR] * 3


WRONG = {
    "no answers": ({"chosen": "a"}, "line 1: expected a list of messages under 'chosen' and under 'rejected'"),
    "other questions": (
        {"chosen": turns("a", "b"), "rejected": turns("c", "b")},
        "differ before the last answer; expected the same conversation",
    ),
    "equal": ({"chosen": turns("a", "b"), "rejected": turns("a", "b")}, "are equal; expected two answers"),
    "no last answer": ({"chosen": turns("a"), "rejected": turns("a", "b")}, "'chosen': does not end with an answer"),
    "a question last": (
        {"chosen": turns("a", "b", "c"), "rejected": turns("a", "b")},
        "'chosen': does not end with an answer; expected a last message of 'assistant'",
    ),
    "another role": ({"chosen": [{"role": "bot", "content": "x"}], "rejected": turns("a", "b")}, "the role 'bot'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_others_are_rejected_by_line(case: str, tmp_path: Path) -> None:
    record, sentence = WRONG[case]
    with pytest.raises(ConfigError) as error:
        read_pairs(written(tmp_path / "p.jsonl", record))
    assert f"{tmp_path / 'p.jsonl'}: line 1" in str(error.value)
    assert sentence in str(error.value)


def test_all_wrong_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n\n{{\n[]\n")
    with pytest.raises(ConfigError, match=r"2 problems: \(1\) line 3: .*; \(2\) line 4: "):
        read_pairs(path)
    path.write_text("")
    with pytest.raises(ConfigError, match="has no preferences"):
        read_pairs(path)
