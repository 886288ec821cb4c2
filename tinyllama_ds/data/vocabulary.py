"""Whether other encoders give the ids of a sentencepiece model: its settings, and texts made from its vocabulary.

Sentencepiece is the reference. gigatoken and the tokenizers library, which reads Hugging Face folders, must give the
same ids for every piece, at any place in a text.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from tinyllama_ds.data.tokenizer import SPACE, UNK_ID, Tokenizer
from tinyllama_ds.errors import ConfigError

if TYPE_CHECKING:
    import tokenizers

# Texts on which tokenizers tend to differ: runs of spaces, tabs, line ends, digits, scripts, bytes, characters that
# normalisation changes, look-alikes of control tokens.
PROBE_TEXTS = [
    "Once upon a time there was a tiny llama.",
    "def f(x):\n    if x:\n        return  x + 1\n\treturn\t0\r\n",
    "  leading and   many      spaces, then trailing   ",
    "12345 3.14159 0xDEADBEEF 1,000,000",
    "naïve café, Ελληνικά, русский, 中文字符, 日本語, العربية, हिन्दी",
    "emoji \U0001f999\U0001f44d\U0001f3fd and a NUL \x00 and a ▁ underline",
    "</s> <s> <unk> are only text here",
    "\n\n\n", " ", "a",
    "    indented\n\t\ttabs\r\n\n\n  ",
    "ﬁ ½ ① Ａ é é ё \u00a0 \u3000 \u2581 \ufeff \x00",
    "한국어 👩‍👩‍👧 \u0378\U0010ffff",
    "0123456789 3.14 " + "=" * 99 + "a" * 999,
    "</s><s><unk><0x0A>[INST]",
]  # fmt: skip
_WHITESPACE = ["", *(" " * width for width in range(1, 20)), *"\t\n\r\v\f\x1c\x85\u00a0\u2003\u200b\u2028\u3000"]
_PIECES_TOGETHER = 40
_EXPECTED = "; expected Llama's settings, which train-tokenizer has"


def probe_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts with every piece of a vocabulary, alone and among others, and more with user-defined, control, byte, unused
    and unknown pieces."""
    texts = [*PROBE_TEXTS, *_WHITESPACE, *(f"{space}a{space}{space}b{space}" for space in _WHITESPACE)]
    pieces = [piece.replace(SPACE, " ") for piece in tokenizer.pieces]
    for number, piece in enumerate(pieces):
        if not tokenizer.is_plain(number):
            texts += [f"a{piece}b", f"{piece}a", f" {piece} ", f"{piece}{piece}", f"a {piece}"]
    starts = range(0, len(pieces), _PIECES_TOGETHER)
    return texts + pieces + ["".join(pieces[start : start + _PIECES_TOGETHER]) for start in starts]


def first_difference(
    tokenizer: Tokenizer, texts: Sequence[str], encode: Callable[[Sequence[str]], Iterable[Iterable[int]]]
) -> str | None:
    """The first text whose ids by `encode` differ from sentencepiece's."""
    pairs = zip(texts, encode(texts), tokenizer.processor.encode(list(texts), num_threads=1), strict=True)
    return next((text for text, found, expected in pairs if list(found) != expected), None)


def reject_inconvertible(tokenizer: Tokenizer) -> None:
    """Raises `ConfigError` for a vocabulary that cannot be exported to a Hugging Face folder."""
    reject_other_settings(tokenizer)
    text = difference_of(fast_tokenizer(tokenizer), tokenizer)
    if text is not None:
        raise ConfigError(
            f"{tokenizer.path}: the tokenizers library gives different ids for {text[:40]!r} than sentencepiece, so"
            " no model trained with it could be exported; expected a vocabulary that train-tokenizer makes"
        )


def difference_of(fast: "tokenizers.Tokenizer", tokenizer: Tokenizer) -> str | None:
    """The first text whose ids by the tokenizers library differ; special tokens are plain text to both.

    Texts that are one user-defined symbol are excluded: their leading blank is lost, see `fast_tokenizer`.
    """
    fast.encode_special_tokens = True
    symbols = set(tokenizer.user_defined)
    texts = [text for text in probe_texts(tokenizer) if text.replace(" ", SPACE) not in symbols]
    return first_difference(
        tokenizer, texts, lambda batch: [found.ids for found in fast.encode_batch(batch, add_special_tokens=False)]
    )


def reject_other_settings(tokenizer: Tokenizer) -> None:
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


def fast_tokenizer(tokenizer: Tokenizer) -> "tokenizers.Tokenizer":
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
        unk_token=tokenizer.pieces[UNK_ID],
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


def ranked_merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
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
