"""gigatoken as an encoder for both kinds of tokenizers: much faster than their own libraries, but not for every file.

It knows no byte-level BPE that splits digits (SmolLM2's `Digits` before `ByteLevel`) or lacks pieces for some bytes.
Both are added here around it. Whether its ids are right is for `encoding.py` to check.
"""

import json
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from string import digits
from typing import Any

import numpy as np

from tinyllama_ds.data.tokenizers.abstract import Encoded, Tokenizer
from tinyllama_ds.data.tokenizers.fast_tokenizer import byte_characters, is_byte_level

Encode = Callable[[Sequence[str]], Encoded]
_PLAIN, _SPACE, _DIGIT, _NUMERAL = range(4)  # kinds of characters
_DIGITS = {"type": "Digits", "individual_digits": True}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def gigatoken_encoder(tokenizer: Tokenizer) -> Encode:
    """Raises an exception of any class where it cannot be imported or cannot read the tokenizer."""
    import gigatoken

    if tokenizer.has_symbols:
        raise ValueError("it encodes user-defined symbols as text")
    # Without added tokens: special ones stay text.
    described = json.loads(tokenizer.to_fast().to_str()) | {"added_tokens": []}
    if not is_byte_level(described["pre_tokenizer"]):
        return _batch_encoder(gigatoken.Tokenizer.from_json(json.dumps(described)))
    vocabulary = described["model"]["vocab"]
    fillers = [character for character in byte_characters() if character not in vocabulary]
    vocabulary |= {character: tokenizer.vocab_size + number for number, character in enumerate(fillers)}
    splits_digits = _splits_digits(described["pre_tokenizer"])
    if splits_digits:
        if any(len(piece) > 1 and set(piece) & set(digits) for piece in vocabulary):
            raise ValueError("it has pieces with several digits, but its pre-tokenizer splits them")
        described["pre_tokenizer"] = described["pre_tokenizer"]["pretokenizers"][1]
    encode = _batch_encoder(gigatoken.Tokenizer.from_json(json.dumps(described)))
    encode = _DigitSplitter(encode) if splits_digits else encode
    return partial(_encode_known, tokenizer, encode) if fillers else encode


def _batch_encoder(fast: Any) -> Encode:
    import awkward

    def encode(texts: Sequence[str]) -> Encoded:
        rows = fast.encode_batch(list(texts), parallel=False)
        return awkward.to_numpy(awkward.flatten(rows)), awkward.to_numpy(awkward.num(rows))

    return encode


def _encode_known(tokenizer: Tokenizer, encode: Encode, texts: Sequence[str]) -> Encoded:
    """Texts in which a byte has no piece are encoded by the tokenizer's own library, which drops it."""
    unknown = [number for number, text in enumerate(texts) if tokenizer.drops_bytes_of(text)]
    ids, lengths = encode(texts)
    if not unknown:
        return ids, lengths
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    for number in unknown:
        parts[number] = np.array(tokenizer.encode(texts[number]), dtype=np.int64)
    return np.concatenate(parts), np.array(list(map(len, parts)))


class _DigitSplitter:
    """Cuts texts where GPT-2's pattern for words, which gigatoken has, does not and the tokenizer's does.

    The pattern of both is the same but for numerals, which `Digits` takes out first: they end white space before them,
    and do not merge with each other.
    """

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._kinds = np.fromiter(map(_kind_of, map(chr, range(0x110000))), dtype=np.uint8)

    def __call__(self, texts: Sequence[str]) -> Encoded:
        together = "".join(texts)
        kinds = self._kinds[np.frombuffer(together.encode("utf-32-le"), dtype="<u4")]
        ends = np.cumsum(np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)))
        bounds = np.unique(np.concatenate(([0], np.flatnonzero(_begins_word(kinds)), ends))).tolist()
        ids, counts = self._encode([together[start:end] for start, end in pairwise(bounds)])
        text_of = np.searchsorted(ends, bounds[:-1], side="right")
        return ids, np.bincount(text_of, weights=counts, minlength=len(texts)).astype(np.int64)


def _begins_word(kinds: np.ndarray) -> np.ndarray:
    """Where a word begins that GPT-2's pattern does not begin: at a digit after two spaces, around other numerals."""
    numeral, space = kinds == _NUMERAL, kinds == _SPACE
    begins = numeral.copy()
    begins[1:] |= numeral[:-1]
    begins[2:] |= (kinds[2:] == _DIGIT) & space[1:-1] & space[:-2]
    return begins


def _kind_of(character: str) -> int:
    if character.isspace():
        return _SPACE
    is_numeral = unicodedata.category(character).startswith("N")
    return (_DIGIT if character.isascii() else _NUMERAL) if is_numeral else _PLAIN


def _splits_digits(pre_tokenizer: dict) -> bool:
    parts = pre_tokenizer.get("pretokenizers", [])
    return len(parts) == 2 and parts[0] == _DIGITS and _BYTE_LEVEL.items() <= parts[1].items()
