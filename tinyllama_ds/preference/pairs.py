"""Preferences: JSON lines, each a conversation with two last answers, the chosen one and the rejected one.

`{"chosen": [...messages], "rejected": [...messages]}`, whole conversations that differ in the last answer, as
UltraFeedback is published; the messages before it may also be under `"prompt"`, as TRL writes it.
"""

import json
from pathlib import Path

from tinyllama_ds.data.chat import Message
from tinyllama_ds.data.prepare.conversations import MESSAGES_FIELD, ChatFormat
from tinyllama_ds.errors import ConfigError, raise_problems
from tinyllama_ds.inputs import read_text

Pair = dict[str, list[dict[str, str]]]  # messages under prompt, chosen and rejected, as TRL reads them
_ANSWERS = ("chosen", "rejected")


def read_pairs(path: Path) -> list[Pair]:
    """The preferences of a file; raises one `ConfigError` with all lines that are not one."""
    pairs, problems = [], []
    for number, line in enumerate(read_text(path, "the file of preferences").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            pairs.append(_pair(json.loads(line)))
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {error}")
    raise_problems(path, problems)
    if not pairs:
        raise ConfigError(f"{path}: has no preferences; expected JSON lines with {' and '.join(_ANSWERS)}")
    return pairs


def _pair(record: object) -> Pair:
    """Raises `ValueError` for a record that is not a preference."""
    if not isinstance(record, dict) or not all(isinstance(record.get(key), list) for key in _ANSWERS):
        raise ValueError("expected a list of messages under 'chosen' and under 'rejected'")
    before = record.get("prompt")
    prompt = before if isinstance(before, list) else []
    chosen, rejected = (_conversation([*prompt, *record[key]], key) for key in _ANSWERS)
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("'chosen' and 'rejected' differ before the last answer; expected the same conversation")
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are equal; expected two answers")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _conversation(messages: list, key: str) -> list[dict[str, str]]:
    record = ChatFormat().record({MESSAGES_FIELD: messages}, repr(key))
    if record.fault:
        raise ValueError(record.fault)
    if record.messages is None or len(record.messages) < len(messages):
        raise ValueError(f"{key!r}: does not end with an answer; expected a last message of 'assistant'")
    return [_as_dict(message) for message in record.messages]


def _as_dict(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}
