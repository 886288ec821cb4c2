"""Whether other encoders give the ids of a tokenizer, on texts made from its vocabulary.

The tokenizer's own library is the reference. gigatoken, and for sentencepiece the tokenizers library, which reads
Hugging Face folders, must give the same ids for every piece, at any place in a text.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from tinyllama_ds.data.tokenizers.abstract import Encoded, Tokenizer, concatenated

if TYPE_CHECKING:
    import tokenizers

SPACE = "▁"  # as sentencepiece writes it

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


def probe_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts with every piece of a vocabulary, alone and among others, and more with user-defined, control, byte, unused
    and unknown pieces."""
    texts = [*PROBE_TEXTS, *_WHITESPACE, *(f"{space}a{space}{space}b{space}" for space in _WHITESPACE)]
    pieces = tokenizer.piece_texts()
    for number, piece in enumerate(pieces):
        if not tokenizer.is_plain(number):
            texts += [f"a{piece}b", f"{piece}a", f" {piece} ", f"{piece}{piece}", f"a {piece}"]
    starts = range(0, len(pieces), _PIECES_TOGETHER)
    return texts + pieces + ["".join(pieces[start : start + _PIECES_TOGETHER]) for start in starts]


def first_difference(
    tokenizer: Tokenizer, texts: Sequence[str], encode: Callable[[Sequence[str]], Encoded]
) -> str | None:
    """The first text whose ids by `encode` differ from those of the tokenizer's own library."""
    ids, lengths = encode(texts)
    expected, counts = tokenizer.encode_batch(texts)
    if np.array_equal(ids, expected) and np.array_equal(lengths, counts):
        return None
    pairs = zip(texts, np.split(ids, np.cumsum(lengths)), np.split(expected, np.cumsum(counts)), strict=False)
    return next(text for text, one, other in pairs if not np.array_equal(one, other))


def difference_of(fast: "tokenizers.Tokenizer", tokenizer: Tokenizer) -> str | None:
    """The first text whose ids by the tokenizers library differ; special tokens are plain text to both.

    Texts that are one user-defined symbol are excluded: their leading blank is lost, see `fast_tokenizer`.
    """
    fast.encode_special_tokens = True
    symbols = set(tokenizer.user_defined)
    texts = [text for text in probe_texts(tokenizer) if text.replace(" ", SPACE) not in symbols]
    return first_difference(tokenizer, texts, partial(encode_fast, fast))


def encode_fast(fast: "tokenizers.Tokenizer", texts: Sequence[str]) -> Encoded:
    """The ids of the texts by the tokenizers library, without BOS and EOS."""
    return concatenated([found.ids for found in fast.encode_batch_fast(list(texts), add_special_tokens=False)])
