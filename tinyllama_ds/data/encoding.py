"""Texts to token ids: sentencepiece is the reference, gigatoken the fast path that has to prove itself equal to it."""

import json
from collections.abc import Callable
from itertools import chain

import numpy as np

from tinyllama_ds.data.tokenizer import EOS_ID, UNK_ID, Tokenizer
from tinyllama_ds.errors import Refusal

ENCODERS = ("auto", "gigatoken", "sentencepiece")
# Every how many documents of a batch one is compared, and how much of it: about 1 % of the text of a usual corpus.
_PROOF_STRIDE = 64
_PROOF_CHARACTERS = 2048
# Where encoders tend to differ: spaces, line ends, digits, scripts, what normalisation changes, control look-alikes.
_PROBES = [
    "    indented\n\t\ttabs\r\n\n\n  ",
    "ﬁ ½ ① Ａ é é ё \u00a0 \u3000 \u2581 \ufeff \x00",
    "中文 日本語 한국어 🙂👩‍👩‍👧",
    "0123456789 3.14 " + "=" * 99 + "a" * 999,
    "</s><s><unk><0x0A>[INST]",
]

Encoded = tuple[np.ndarray, np.ndarray]  # the ids of all documents one after the other, and the length of each


def encode_with_sentencepiece(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    """Ids of each text alone."""
    documents = tokenizer.processor.encode(texts, num_threads=1)  # the pool of processes has the cores already
    lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
    return np.fromiter(chain.from_iterable(documents), dtype=np.int64, count=lengths.sum()), lengths


def load_gigatoken(tokenizer: Tokenizer, encoder: str) -> Callable[[list[str]], Encoded] | None:
    """gigatoken with this vocabulary, or None where it is not wanted, does not import, or cannot follow sentencepiece.

    Raises `Refusal` for the last two where `encoder` asks for it by name.
    """
    if encoder == "sentencepiece":
        return None
    try:
        encode = _gigatoken(tokenizer)
    except ImportError as error:  # of gigatoken, or of what it needs
        reason = f"does not import ({error})"
    else:
        if _is_same(encode(_PROBES), encode_with_sentencepiece(tokenizer, _PROBES)):
            return encode
        reason = "gives other ids than sentencepiece with it"
    if encoder == "gigatoken":
        raise Refusal(f"{tokenizer.path}: the encoder gigatoken {reason}; expected --encoder auto or sentencepiece")
    return None


def _gigatoken(tokenizer: Tokenizer) -> Callable[[list[str]], Encoded]:
    import awkward
    import gigatoken

    fast = gigatoken.Tokenizer.from_json(_tokenizer_json(tokenizer))

    def encode(texts: list[str]) -> Encoded:
        rows = fast.encode_batch(texts, parallel=False)
        return awkward.to_numpy(awkward.flatten(rows)), awkward.to_numpy(awkward.num(rows))

    return encode


def _tokenizer_json(tokenizer: Tokenizer) -> str:
    """The vocabulary as Hugging Face writes one, without control tokens among the added ones: text stays text."""
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            },
            "model": {
                "type": "BPE",
                "vocab": {piece: number for number, piece in enumerate(tokenizer.pieces)},
                "merges": ranked_merges(tokenizer),
                "unk_token": tokenizer.pieces[UNK_ID],
                "fuse_unk": True,
                "byte_fallback": True,
            },
        }
    )


def ranked_merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Every way to make a piece from two others, best score first; of one piece, in the order of its left half.

    Sentencepiece merges the pair whose result has the highest score, whatever its id.
    """
    processor = tokenizer.processor
    scores = {
        piece: processor.get_score(number)
        for number, piece in enumerate(tokenizer.pieces)
        if not (processor.is_control(number) or processor.is_unknown(number) or processor.is_byte(number))
    }
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
    ]
    return [(left, right) for left, right in merges if left in scores and right in scores]


def _is_same(one: Encoded, other: Encoded) -> bool:
    return np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])


class FileEncoder:
    """Encodes the documents of one file, by gigatoken until a sample of them shows a difference, if one ever does."""

    def __init__(self, tokenizer: Tokenizer, fast: Callable[[list[str]], Encoded] | None) -> None:
        self.tokenizer = tokenizer
        self._fast = fast
        self._documents = 0
        self.name = "gigatoken" if fast is not None else "sentencepiece"

    def encode(self, texts: list[str]) -> Encoded:
        """Ids of all documents one after the other, each text and one EOS, no BOS; and the length of each document.

        Text such as `</s>` stays text.
        """
        if self._fast is not None and not self._proves_equal(texts):
            self._fast = None
            self.name = f"gigatoken, but sentencepiece from document {self._documents}, where they differ"
        self._documents += len(texts)
        ids, lengths = self._fast(texts) if self._fast else encode_with_sentencepiece(self.tokenizer, texts)
        return _append_eos(ids, lengths)

    def _proves_equal(self, texts: list[str]) -> bool:
        assert self._fast is not None
        sample = [text[:_PROOF_CHARACTERS] for text in texts[::_PROOF_STRIDE]]
        return _is_same(self._fast(sample), encode_with_sentencepiece(self.tokenizer, sample))


def _append_eos(ids: np.ndarray, lengths: np.ndarray) -> Encoded:
    is_text = np.ones(len(ids) + len(lengths), dtype=bool)
    is_text[np.cumsum(lengths + 1) - 1] = False
    marked = np.full(len(is_text), EOS_ID, dtype=ids.dtype)
    marked[is_text] = ids
    return marked, lengths + 1
