"""Texts to token ids: sentencepiece is the reference, gigatoken a fast path that is verified against it."""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from tinyllama_ds.data.tokenizer import EOS_ID, Tokenizer
from tinyllama_ds.data.vocabulary import fast_tokenizer, first_difference, probe_texts
from tinyllama_ds.errors import ConfigError, log

ENCODERS = ("auto", "gigatoken", "sentencepiece")
# One of so many documents of a batch is compared, up to a length: about 1 % of the text of a usual corpus.
_CHECK_STRIDE = 64
_CHECK_CHARACTERS = 2048

Encoded = tuple[np.ndarray, np.ndarray]  # the concatenated ids of all documents, and the length of each


def encode_with_sentencepiece(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    """The ids of the texts, without BOS and EOS."""
    documents = tokenizer.processor.encode(texts, num_threads=1)  # the pool of processes uses the cores already
    lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
    return np.fromiter(chain.from_iterable(documents), dtype=np.int64, count=lengths.sum()), lengths


def load_gigatoken(tokenizer: Tokenizer, encoder: str) -> Callable[[list[str]], Encoded] | None:
    """gigatoken with this vocabulary, or None where it is not requested, not importable, or differs from sentencepiece.

    The ids of every piece of the vocabulary are compared. Where `encoder` names gigatoken, raises `ConfigError` for the
    last two; else a difference is reported on the console.
    """
    if encoder == "sentencepiece":
        return None
    try:
        encode = _gigatoken(tokenizer)
    except ImportError as error:  # of gigatoken or its dependencies
        if encoder == "auto":
            return None
        raise _cannot_use(tokenizer, f"does not import ({error})") from error
    except Exception as error:  # the library raises nothing more specific
        reason = f"cannot load it ({next(iter(str(error).splitlines()), error)})"
    else:
        differing = _first_difference(tokenizer, encode)
        if differing is None:
            return encode
        reason = f"gives different ids for {differing[:40]!r} than sentencepiece"
    if encoder == "gigatoken":
        raise _cannot_use(tokenizer, reason)
    if multiprocessing.parent_process() is None:  # once, and not in each worker
        log(f"{tokenizer.path}: gigatoken {reason}; sentencepiece encodes")
    return None


def _cannot_use(tokenizer: Tokenizer, reason: str) -> ConfigError:
    return ConfigError(f"{tokenizer.path}: the encoder gigatoken {reason}; expected --encoder auto or sentencepiece")


def _first_difference(tokenizer: Tokenizer, encode: Callable[[list[str]], Encoded]) -> str | None:
    def split(texts: Sequence[str]) -> list[np.ndarray]:
        ids, lengths = encode(list(texts))
        return np.split(ids, np.cumsum(lengths)[:-1])

    return first_difference(tokenizer, probe_texts(tokenizer), split)


def _gigatoken(tokenizer: Tokenizer) -> Callable[[list[str]], Encoded]:
    import awkward
    import gigatoken

    if tokenizer.user_defined:
        raise ValueError("it encodes user-defined symbols as text")
    fast = gigatoken.Tokenizer.from_json(_tokenizer_json(tokenizer))

    def encode(texts: list[str]) -> Encoded:
        rows = fast.encode_batch(texts, parallel=False)
        return awkward.to_numpy(awkward.flatten(rows)), awkward.to_numpy(awkward.num(rows))

    return encode


def _tokenizer_json(tokenizer: Tokenizer) -> str:
    """The vocabulary as a `tokenizer.json`, without added tokens: `</s>` stays text."""
    return json.dumps(json.loads(fast_tokenizer(tokenizer).to_str()) | {"added_tokens": []})


def _is_same(one: Encoded, other: Encoded) -> bool:
    return np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])


class FileEncoder:
    """Encodes the documents of one file, by gigatoken until a sample of them shows a difference."""

    def __init__(self, tokenizer: Tokenizer, fast: Callable[[list[str]], Encoded] | None) -> None:
        self.tokenizer = tokenizer
        self._fast = fast
        self._documents = 0
        self.name = "gigatoken" if fast is not None else "sentencepiece"

    def encode(self, texts: list[str]) -> Encoded:
        """The concatenated ids of all documents, each with one EOS and no BOS, and the length of each document.

        Text such as `</s>` stays text.
        """
        if self._fast is not None and not self._matches_sentencepiece(texts):
            self._fast = None
            self.name = f"gigatoken, but sentencepiece from document {self._documents}, where they differ"
        self._documents += len(texts)
        ids, lengths = self._fast(texts) if self._fast else encode_with_sentencepiece(self.tokenizer, texts)
        return _append_eos(ids, lengths)

    def _matches_sentencepiece(self, texts: list[str]) -> bool:
        assert self._fast is not None
        sample = [text[:_CHECK_CHARACTERS] for text in texts[::_CHECK_STRIDE]]
        return _is_same(self._fast(sample), encode_with_sentencepiece(self.tokenizer, sample))


def _append_eos(ids: np.ndarray, lengths: np.ndarray) -> Encoded:
    is_text = np.ones(len(ids) + len(lengths), dtype=bool)
    is_text[np.cumsum(lengths + 1) - 1] = False
    marked = np.full(len(is_text), EOS_ID, dtype=ids.dtype)
    marked[is_text] = ids
    return marked, lengths + 1
