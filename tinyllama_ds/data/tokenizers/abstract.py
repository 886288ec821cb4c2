"""What every tokenizer does: texts to token ids and back, special ids by role, and its identity."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    import tokenizers

Encoded = tuple[np.ndarray, np.ndarray]  # the concatenated ids of all texts (tokens,), and the length of each (texts,)


def concatenated(documents: Sequence[Sequence[int]]) -> Encoded:
    """The ids of some texts as arrays."""
    lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
    return np.fromiter(chain.from_iterable(documents), dtype=np.int64, count=lengths.sum()), lengths


class Tokenizer(ABC):
    """Texts to token ids and back. Its library's ids are the reference; special tokens in a text stay text.

    `files` are what is stored with tokens, runs and models, by name; `sha256` is the hash of their contents. The
    special ids are from the tokenizer's own files; `eos_id` separates documents, others are None where it has none.
    """

    library: ClassVar[str]  # whose ids are the reference
    cuts_turns: ClassVar[bool]  # whether a message of a conversation is encoded apart from its header
    path: Path
    files: dict[str, bytes]
    vocab_size: int  # the largest id plus one
    eos_id: int
    bos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(b"".join(self.files.values())).hexdigest()

    @property
    def end_of_document(self) -> str:
        """What separates documents, for a manifest."""
        return f"one EOS (id {self.eos_id}) after each document, no BOS"

    @property
    def end_of_turn(self) -> str:
        """What separates the turns of a conversation, for a manifest."""
        return f"one EOS (id {self.eos_id}) after each turn, no BOS"

    @property
    def special_ids(self) -> list[int]:
        """The ids that no text has: bos, eos, pad and unk, as far as there are."""
        return sorted({number for number in (self.bos_id, self.eos_id, self.pad_id, self.unk_id) if number is not None})

    @property
    def user_defined(self) -> list[str]:
        """Symbols that an exported tokenizer encodes differently where a text is nothing but one of them."""
        return []

    @property
    @abstractmethod
    def has_symbols(self) -> bool:
        """Whether some pieces that are not special are matched in a text as they are, before any merge."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """The ids of the texts, without BOS and EOS, on one core."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS and EOS."""
        return self.encode_batch([text])[0].tolist()

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of some ids; special tokens, and ids beyond the vocabulary from padded rows, have none."""

    @abstractmethod
    def readable(self, text: str) -> str:
        """A text as it is after encoding and decoding."""

    def drops_bytes_of(self, text: str) -> bool:
        """Whether a text has bytes without a piece, which the library drops: some lack control characters."""
        return False

    @abstractmethod
    def piece_texts(self) -> list[str]:
        """The text of each id (vocab_size,)."""

    @abstractmethod
    def is_plain(self, number: int) -> bool:
        """Whether a piece comes from merges: not a special token, a user-defined one, unknown, unused or a byte."""

    @abstractmethod
    def control_tokens(self) -> list[str]:
        """The texts that transformers takes for special tokens."""

    @abstractmethod
    def to_fast(self) -> "tokenizers.Tokenizer":
        """The same ids by the tokenizers library, for transformers' PreTrainedTokenizerFast."""

    @abstractmethod
    def reject_inconvertible(self) -> None:
        """Raise `ConfigError` where no Hugging Face folder could have this tokenizer with the same ids."""

    @abstractmethod
    def reject_for_chat(self, header: str) -> None:
        """Raise `ConfigError` where a message could merge with the header before it, or the header is unknown."""
