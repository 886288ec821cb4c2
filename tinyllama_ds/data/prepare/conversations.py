"""Chat files: records that hold a conversation, in one of two formats.

`{"messages": [{"role": "user", "content": "..."}, ...]}`, as ChatML's tools write it, and OpenAssistant-Guanaco's
`{"text": "### Human: ...### Assistant: ..."}`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from tinyllama_ds.config.validation import validate
from tinyllama_ds.data.chat import ROLES, Message
from tinyllama_ds.data.prepare.sources import Record, SourceFormat, instead_of

MESSAGES_FIELD = "messages"
_GUANACO_TURN = re.compile(r"### (Human|Assistant):")
_GUANACO_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class ChatFormat(SourceFormat):
    """Where a chat file has its conversations, and how long they may be.

    A record is read as messages where it has them, else as Guanaco's text. A last turn without an answer is dropped.
    """

    max_tokens: int = 2048

    @property
    def expected_columns(self) -> str:
        return f"{MESSAGES_FIELD!r} or {self.text_field!r}"

    @property
    def keys(self) -> frozenset[str]:
        return frozenset({MESSAGES_FIELD, self.text_field, "role", "content"})

    def columns(self, present: Sequence[str]) -> list[str]:
        return next(([field] for field in (MESSAGES_FIELD, self.text_field) if field in present), [])

    def record(self, raw: object, place: str) -> Record:
        try:
            messages = self._messages(raw)
            _check_roles(messages)
            size = sum(len(message.content.encode()) for message in messages)
        except UnicodeEncodeError as error:
            return Record(fault=f"{place}: a lone surrogate at character {error.start} of a message")
        except ValueError as error:
            return Record(fault=f"{place}: {error}")
        has_answer = any(message.role == "assistant" for message in messages)
        if not has_answer:
            return Record(rejected="no answer")
        if messages[-1].role == "assistant":
            return Record(messages=tuple(messages), text_bytes=size)
        return Record(messages=tuple(messages[:-1]), text_bytes=size, shortened="last turn without an answer")

    def _messages(self, raw: object) -> list[Message]:
        """Raises `ValueError` for a record without a conversation."""
        if isinstance(raw, dict) and isinstance(raw.get(MESSAGES_FIELD), list):
            return [_message(entry, number) for number, entry in enumerate(raw[MESSAGES_FIELD], start=1)]
        if isinstance(raw, dict) and isinstance(raw.get(self.text_field), str):
            return _guanaco_messages(raw[self.text_field])
        expected = f"expected a list under {MESSAGES_FIELD!r}, or a text under {self.text_field!r}"
        raise ValueError(f"{expected}, {instead_of(raw, MESSAGES_FIELD)}")


def format_from_dict(raw: dict) -> SourceFormat:
    """How a shard's inputs were read, by its manifest. Raises `ConfigError` for another format."""
    return validate(ChatFormat if "max_tokens" in raw else SourceFormat, raw, "source_format of its manifest")


def _message(entry: object, number: int) -> Message:
    role = entry.get("role") if isinstance(entry, dict) else None
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"message {number}: expected texts under 'role' and 'content'")
    return Message(role, content)


def _guanaco_messages(text: str) -> list[Message]:
    before, *turns = _GUANACO_TURN.split(text)
    if before.strip() or not turns:
        raise ValueError(f"expected a text that begins with '### Human:', not with {text[:20]!r}")
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [Message(_GUANACO_ROLES[speaker], content.strip()) for speaker, content in pairs]


def _check_roles(messages: Sequence[Message]) -> None:
    """An optional system message, then user and assistant in alternation, none of them empty."""
    has_system = bool(messages) and messages[0].role == "system"
    expected = cycle(("user", "assistant"))
    for number, message in enumerate(messages, start=1):
        if message.role not in ROLES:
            raise ValueError(f"message {number}: the role {message.role!r:.40}; expected one of {', '.join(ROLES)}")
        role = "system" if has_system and number == 1 else next(expected)
        if message.role != role:
            raise ValueError(f"message {number}: is from {message.role!r}; expected {role!r} after what is before it")
        if not message.content.strip():
            raise ValueError(f"message {number}: the turn of {message.role!r} is empty")
