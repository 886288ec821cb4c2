"""The sentencepiece tokenizer: training one with Llama's settings, loading one, and its identity."""

import hashlib
import io
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import write_durably
from tinyllama_ds.layout import TOKENIZER_FILE
from tinyllama_ds.outputs import write_file

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
SPACE = "▁"  # as sentencepiece writes it
END_OF_DOCUMENT = f"one EOS (id {EOS_ID}) after each document, no BOS"


class Tokenizer:
    """A sentencepiece model and its SHA-256; ids 0, 1, 2 are unk, bos and eos, as in Llama's."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(f"{path}: the tokenizer is missing; expected a sentencepiece model")
        try:
            self.content = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: the tokenizer cannot be read ({error.strerror})") from error
        self.path = path
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        if not self.content:  # which sentencepiece would load
            raise ConfigError(f"{path}: is empty; expected a sentencepiece model")
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=self.content)
            self.pieces: list[str] = self.processor.id_to_piece(list(range(self.processor.vocab_size())))
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not a sentencepiece model{_instead(self.content)}") from error
        special = (self.processor.unk_id(), self.processor.bos_id(), self.processor.eos_id())
        if special != (UNK_ID, BOS_ID, EOS_ID):
            raise ConfigError(f"{path}: the ids of unk, bos, eos are {special}; expected {(UNK_ID, BOS_ID, EOS_ID)}")

    @property
    def vocab_size(self) -> int:
        return self.processor.vocab_size()

    @cached_property
    def proto(self) -> Any:
        """The model as sentencepiece's protocol buffer: settings, and the type of each piece."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

        proto = ModelProto()
        proto.ParseFromString(self.content)
        return proto

    def is_plain(self, number: int) -> bool:
        """Whether a piece is normal: not user-defined, control, unknown, unused or a byte."""
        return self.proto.pieces[number].type == self.proto.SentencePiece.Type.NORMAL

    @cached_property
    def user_defined(self) -> list[str]:
        """The pieces that are matched in a text as they are, before any merge."""
        kind = self.proto.SentencePiece.Type.USER_DEFINED
        return [piece.piece for piece in self.proto.pieces if piece.type == kind]

    def encode(self, text: str) -> list[int]:
        """Ids of a text alone."""
        return self.processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)


def _instead(content: bytes) -> str:
    """What a file may be that is not a sentencepiece model, for a message."""
    start = content[:4096].lstrip()
    if start.startswith(b"version https://git-lfs"):
        return ", but a Git LFS pointer to one; run git lfs pull"
    if start.startswith(b"{"):
        return ", but JSON; expected the tokenizer.model beside a tokenizer.json"
    if not start.strip(b"\0"):
        return ", it begins with NUL bytes, as after a power loss"
    return ", or a truncated one"


def stored_tokenizer(path: Path, sha256: str, holder: str) -> Tokenizer:
    """The tokenizer of a run or a model folder; raises `ConfigError` unless it has the recorded SHA-256."""
    tokenizer = Tokenizer(path)
    if tokenizer.sha256 != sha256:
        raise ConfigError(
            f"{path}: is not the tokenizer of {holder}, its SHA-256 is {tokenizer.sha256[:16]}...; expected"
            f" {sha256[:16]}..."
        )
    return tokenizer


def store_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    """Store the tokenizer with the tokens; raises `ConfigError` where a different one is stored already."""
    held = output / TOKENIZER_FILE
    if held.exists():
        if Tokenizer(held).sha256 != tokenizer.sha256:
            raise ConfigError(
                f"{held}: differs from {tokenizer.path}; one data directory holds tokens of one tokenizer"
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    write_durably(held, tokenizer.content)


def train_tokenizer(texts: Iterable[str], vocab_size: int, output: Path, max_bytes: int = 20_000_000) -> Tokenizer:
    """Train a BPE tokenizer with Llama's settings on up to `max_bytes` of text, and write it to `output`.

    Byte fallback, digits split, no normalisation, a dummy space before the text, runs of spaces kept
    (the trainer specification inside Llama 2's own tokenizer.model).
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, max_bytes),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            character_coverage=0.99995,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4192,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(f"training a tokenizer with {vocab_size} pieces failed: {error}") from error
    write_file(output, model.getvalue())
    return Tokenizer(output)


def _sentences(texts: Iterable[str], max_bytes: int) -> Iterable[str]:
    """Lines of the texts up to a total size; the sentencepiece trainer learns within lines."""
    remaining = max_bytes
    for text in texts:
        for line in text.splitlines():
            if line.strip():
                yield line
                remaining -= len(line.encode())
        if remaining <= 0:
            return
