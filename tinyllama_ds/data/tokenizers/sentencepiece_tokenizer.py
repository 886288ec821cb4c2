"""`tokenizer.model`: a sentencepiece model, as Llama 2's and TinyLlama's."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece

from tinyllama_ds.data.tokenizers.abstract import Encoded, Tokenizer, concatenated
from tinyllama_ds.data.tokenizers.vocabulary import SPACE, difference_of
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.layout import TOKENIZER_MODEL

if TYPE_CHECKING:
    import tokenizers

_EXPECTED = "; expected Llama's settings, which train-tokenizer has"


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model; its special ids are in the model itself."""

    library = "sentencepiece"
    cuts_turns = False  # each text that is encoded gets a blank

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.files = {TOKENIZER_MODEL: content}
        if not content:  # which sentencepiece would load
            raise ConfigError(f"{path}: is empty; expected a sentencepiece model")
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.pieces: list[str] = self.processor.id_to_piece(list(range(self.processor.vocab_size())))
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not a sentencepiece model{_instead(content)}") from error
        self.vocab_size = self.processor.vocab_size()
        special = (self.processor.bos_id(), self.processor.unk_id(), self.processor.pad_id())
        self.bos_id, self.unk_id, self.pad_id = (number if number >= 0 else None for number in special)
        self.eos_id = self.processor.eos_id()
        if self.eos_id < 0:
            raise ConfigError(f"{path}: has no eos piece; expected one, which separates documents")

    @cached_property
    def proto(self) -> Any:
        """The model as sentencepiece's protocol buffer: settings, and the type of each piece."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

        proto = ModelProto()
        proto.ParseFromString(self.files[TOKENIZER_MODEL])
        return proto

    def is_plain(self, number: int) -> bool:
        return self.proto.pieces[number].type == self.proto.SentencePiece.Type.NORMAL

    @cached_property
    def user_defined(self) -> list[str]:
        """The pieces that are matched in a text as they are, before any merge."""
        kind = self.proto.SentencePiece.Type.USER_DEFINED
        return [piece.piece for piece in self.proto.pieces if piece.type == kind]

    @property
    def has_symbols(self) -> bool:
        return bool(self.user_defined)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        return concatenated(self.processor.encode(list(texts), num_threads=1))

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode([number for number in ids if number < self.vocab_size])

    def readable(self, text: str) -> str:  # a space is U+2581 to sentencepiece, so that character becomes a space
        return text.replace(SPACE, " ")

    def piece_texts(self) -> list[str]:
        return [piece.replace(SPACE, " ") for piece in self.pieces]

    def control_tokens(self) -> list[str]:
        return [self.pieces[number] for number in self.special_ids]

    def to_fast(self) -> "tokenizers.Tokenizer":
        return fast_tokenizer(self)

    def reject_inconvertible(self) -> None:
        reject_inconvertible(self)

    def reject_for_chat(self, header: str) -> None:
        merged = next((piece for piece in self.pieces if "\n" in piece and len(piece) > 1), None)
        if merged is not None:
            raise ConfigError(
                f"{self.path}: has the piece {merged!r}, which could merge an answer with the line break before it;"
                " expected a vocabulary that keeps line breaks apart"
            )
        if self.unk_id in self.encode(header):
            raise ConfigError(
                f"{self.path}: has no tokens for {header!r}, which begins an answer; expected a vocabulary with"
                " byte fallback"
            )


def _instead(content: bytes) -> str:
    """What a file may be that is not a sentencepiece model, for a message."""
    start = content[:4096].lstrip()
    if start.startswith(b"version https://git-lfs"):
        return ", but a Git LFS pointer to one; run git lfs pull"
    if not start.strip(b"\0"):
        return ", it begins with NUL bytes, as after a power loss"
    return ", or a truncated one"


# --- for the tokenizers library ---------------------------------------------------------------------------------------


def reject_inconvertible(tokenizer: SentencePieceTokenizer) -> None:
    """Raises `ConfigError` for a vocabulary that cannot be exported to a Hugging Face folder."""
    reject_other_settings(tokenizer)
    text = difference_of(fast_tokenizer(tokenizer), tokenizer)
    if text is not None:
        raise ConfigError(
            f"{tokenizer.path}: the tokenizers library gives different ids for {text[:40]!r} than sentencepiece, so"
            " no model trained with it could be exported; expected a vocabulary that train-tokenizer makes"
        )


def reject_other_settings(tokenizer: SentencePieceTokenizer) -> None:
    """Raises `ConfigError` for a sentencepiece model with settings other than Llama's, which cannot be converted."""
    trainer, normalizer = tokenizer.proto.trainer_spec, tokenizer.proto.normalizer_spec
    kind = trainer.ModelType.Name(trainer.model_type).lower()
    unlike = {
        f"is a {kind} model": kind != "bpe",
        f"normalises its text ({normalizer.name})": bool(normalizer.precompiled_charsmap),
        "removes spaces (remove_extra_whitespaces)": normalizer.remove_extra_whitespaces,
        "puts no space before a text (add_dummy_prefix is off)": not normalizer.add_dummy_prefix,
        "keeps spaces as they are (escape_whitespaces is off)": not normalizer.escape_whitespaces,
        "takes spaces for the end of a word (treat_whitespace_as_suffix)": trainer.treat_whitespace_as_suffix,
    }
    found = [what for what, is_so in unlike.items() if is_so]
    if found:
        raise ConfigError(f"{tokenizer.path}: {' and '.join(found)}, which export cannot convert{_EXPECTED}")


def fast_tokenizer(tokenizer: SentencePieceTokenizer) -> "tokenizers.Tokenizer":
    """The sentencepiece model for the tokenizers library, with the same ids.

    transformers' own conversion orders merges by id and pre-splits words, which changes runs of spaces. Sentencepiece
    merges the pair whose result has the highest score, so merges are ranked by score here, and nothing is pre-split.
    User-defined symbols are matched in the text before any merge, in both. The library normalises them too, and a blank
    before a symbol would belong to it; so a text that is one symbol gets none.
    """
    import tokenizers

    model = tokenizers.models.BPE(
        vocab={piece: index for index, piece in enumerate(tokenizer.pieces)},
        merges=ranked_merges(tokenizer),
        unk_token=tokenizer.pieces[tokenizer.unk_id] if tokenizer.unk_id is not None else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    fast = tokenizers.Tokenizer(model)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    blank: tokenizers.normalizers.Normalizer = normalizers.Prepend(SPACE)
    symbols = [
        symbol for symbol in tokenizer.user_defined if " " not in symbol
    ]  # a text has no " " when it is searched
    if symbols:
        any_symbol = "|".join(map(re.escape, symbols))
        blank = normalizers.Replace(tokenizers.Regex(rf"\A(?!(?:{any_symbol})\z)"), SPACE)
    fast.normalizer = normalizers.Sequence([blank, normalizers.Replace(" ", SPACE)])
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_tokens([tokenizers.AddedToken(symbol, normalized=True) for symbol in symbols])
    return fast


def ranked_merges(tokenizer: SentencePieceTokenizer) -> list[tuple[str, str]]:
    """Every way to merge two normal pieces into a third, best score first; ties by the length of the left half.

    Sentencepiece merges the pair whose result has the highest score, whatever its id.
    """
    scores = {
        piece: tokenizer.processor.get_score(number)
        for number, piece in enumerate(tokenizer.pieces)
        if tokenizer.is_plain(number)
    }
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
    ]
    return [(left, right) for left, right in merges if left in scores and right in scores]
