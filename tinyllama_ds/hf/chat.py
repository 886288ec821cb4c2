"""A conversation with a chat model: the history that fits its positions, and answers streamed as text."""

import io
import sys
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from tinyllama_ds.data.chat import Message
from tinyllama_ds.errors import ConfigError, printable
from tinyllama_ds.hf.generate import LoadedModel, Sampling, continue_ids

HELP = "/reset clears the conversation, /exit ends it"
Continue = Callable[[LoadedModel, list[int], Sampling, BaseStreamer | None], list[int]]


class Conversation:
    """The messages so far; the oldest exchanges are dropped when they no longer fit the model's positions."""

    def __init__(
        self,
        loaded: LoadedModel,
        sampling: Sampling,
        system: str | None = None,
        continue_prompt: Continue = continue_ids,  # speculative decoding has its own
    ) -> None:
        assert loaded.encode_chat is not None
        self._encode = loaded.encode_chat
        self._loaded = loaded
        self._sampling = sampling
        self._continue = continue_prompt
        self._system = [Message("system", system)] if system else []
        self.messages: list[Message] = []  # user and assistant alternate
        torch.manual_seed(sampling.seed)

    def reset(self) -> None:
        """Drop everything but the system message."""
        self.messages = []

    def ask(self, question: str, on_text: Callable[[str], None]) -> str:
        """The answer to a question; `on_text` gets its text as it is generated.

        Ctrl-C ends the answer and keeps its text. Raises `ConfigError` for a question that is too long.
        """
        ids = self._fit(Message("user", question))
        streamer = _TextStreamer(self._loaded, on_text)
        with suppress(KeyboardInterrupt):
            self._continue(self._loaded, ids, self._sampling, streamer)
        answer = streamer.finish()
        if answer.strip():
            self.messages.append(Message("assistant", answer))
        else:
            self.messages.pop()  # the template has no place for a question without an answer
        return answer

    def _fit(self, question: Message) -> list[int]:
        """Append the question; drop as many of the oldest exchanges as necessary; returns the ids of the prompt."""
        positions = self._loaded.positions
        limit = positions - min(self._sampling.max_new_tokens, positions // 2)
        kept = self.messages
        while len(ids := self._encode([*self._system, *kept, question])) > limit and kept:
            kept = kept[2:]
        if len(ids) > limit:
            raise ConfigError(f"the question has {len(ids)} tokens in the chat template; expected {limit} at most")
        self.messages = [*kept, question]
        return ids


class _TextStreamer(BaseStreamer):
    """Token ids to text, passed on in whole characters, which may take several tokens."""

    def __init__(self, loaded: LoadedModel, on_text: Callable[[str], None]) -> None:
        self._loaded = loaded
        self._on_text = on_text
        self._ids: list[int] = []
        self._is_prompt = True  # what `generate` puts first
        self._written = 0

    def put(self, value: Tensor) -> None:
        if not self._is_prompt:
            self._ids += [token for token in value.flatten().tolist() if token != self._loaded.eos_id]
            self._write(self._loaded.decode(self._ids).rstrip("\ufffd"))
        self._is_prompt = False

    def end(self) -> None:
        pass

    def finish(self) -> str:
        text = self._loaded.decode(self._ids)
        self._write(text)
        return text

    def _write(self, text: str) -> None:
        if len(text) > self._written:
            self._on_text(printable(text[self._written :]))
            self._written = len(text)


def chat_loop(conversation: Conversation, after_answer: Callable[[], None] = lambda: None) -> None:
    """Questions from standard input, a line each, and answers to standard output, until its end or `/exit`."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 does not end the conversation
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 - gives `input` a line editor and a history
        print(f"{HELP}; Ctrl-C stops an answer, Ctrl-D ends the conversation")
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
            print(f"{question.split()[0]} is not a command; {HELP}")
        elif any("\ud800" <= character <= "\udfff" for character in question):
            print("the question is not UTF-8 and was ignored")
        elif question:
            _answer(conversation, question)
            after_answer()


def _answer(conversation: Conversation, question: str) -> None:
    try:
        conversation.ask(question, lambda text: print(text, end="", flush=True))
    except ConfigError as error:
        print(error, end="")
    print()
