"""A conversation with a model: its history, held within the model's positions, and answers as they are written."""

import io
import sys
from collections.abc import Callable
from contextlib import suppress

import torch

from tinyllama_ds.data.chat import Message
from tinyllama_ds.errors import ConfigError, printable
from tinyllama_ds.hf.generate import LoadedModel, Sampling, continue_ids

HELP = "/reset forgets what was said, /exit leaves"


class Conversation:
    """What was said so far to a chat model.

    The oldest exchanges are forgotten when the model's positions would not hold them.
    """

    def __init__(self, loaded: LoadedModel, sampling: Sampling, system: str | None = None) -> None:
        assert loaded.encode_chat is not None
        self._encode = loaded.encode_chat
        self._loaded = loaded
        self._sampling = sampling
        self._system = [Message("system", system)] if system else []
        self.messages: list[Message] = []  # user and assistant by turns
        torch.manual_seed(sampling.seed)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = []

    def ask(self, question: str, on_text: Callable[[str], None]) -> str:
        """The answer to a question, whose pieces `on_text` gets as they come.

        Ctrl-C ends the answer, and what was written of it counts. Raises `ConfigError` for a question that is too long.
        """
        ids = self._fit(Message("user", question))
        writing = _TextStreamer(self._loaded, on_text)
        with suppress(KeyboardInterrupt):
            continue_ids(self._loaded, ids, self._sampling, writing.add)
        answer = writing.finish()
        if answer.strip():
            self.messages.append(Message("assistant", answer))
        else:
            self.messages.pop()  # a question without an answer has no place in the template
        return answer

    def _fit(self, question: Message) -> list[int]:
        """Append the question; returns the prompt's ids, after as many oldest exchanges were forgotten as it takes."""
        positions = self._loaded.positions
        room = positions - min(self._sampling.max_new_tokens, positions // 2)
        kept = self.messages
        while len(ids := self._encode([*self._system, *kept, question])) > room and kept:
            kept = kept[2:]
        if len(ids) > room:
            raise ConfigError(f"the question has {len(ids)} tokens with its frame; the model takes {room} of them")
        self.messages = [*kept, question]
        return ids


class _TextStreamer:
    """Token ids to pieces of text, each handed on once it is whole: a character may take several tokens."""

    def __init__(self, loaded: LoadedModel, on_text: Callable[[str], None]) -> None:
        self._loaded = loaded
        self._on_text = on_text
        self._ids: list[int] = []
        self._written = 0

    def add(self, token: int) -> None:
        if token != self._loaded.end_of_turn:
            self._ids.append(token)
            self._write(self._loaded.decode(self._ids).rstrip("\ufffd"))

    def finish(self) -> str:
        text = self._loaded.decode(self._ids)
        self._write(text)
        return text

    def _write(self, text: str) -> None:
        if len(text) > self._written:
            self._on_text(printable(text[self._written :]))
            self._written = len(text)


def chat_loop(conversation: Conversation) -> None:
    """Questions from standard input, a line each, and answers to standard output, until it ends or `/exit`."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 does not end the conversation
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 - gives `input` a line editor and a history
        print(f"{HELP}; Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            question = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()
            continue
        if question == "/exit":
            return
        if question == "/reset":
            conversation.reset()
        elif question.startswith("/"):
            print(f"{question.split()[0]} is no command; {HELP}")
        elif any("\ud800" <= character <= "\udfff" for character in question):
            print("the question is not UTF-8; it is left out")
        elif question:
            _answer(conversation, question)


def _answer(conversation: Conversation, question: str) -> None:
    try:
        conversation.ask(question, lambda text: print(text, end="", flush=True))
    except ConfigError as error:
        print(error, end="")
    print()
