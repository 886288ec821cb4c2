"""Texts to token ids: the tokenizer's own library is the reference, gigatoken a fast path verified against it."""

import multiprocessing

import numpy as np

from tinyllama_ds.data.tokenizers.abstract import Encoded, Tokenizer
from tinyllama_ds.data.tokenizers.gigatoken_encoder import Encode, gigatoken_encoder
from tinyllama_ds.data.tokenizers.vocabulary import first_difference, probe_texts
from tinyllama_ds.errors import ConfigError, log

# One of so many documents of a batch is compared, up to a length: about 1 % of the text of a usual corpus.
_CHECK_STRIDE = 64
_CHECK_CHARACTERS = 2048


def load_gigatoken(tokenizer: Tokenizer, encoder: str) -> Encode | None:
    """gigatoken with this vocabulary, or None where it is not requested, not importable, or differs from the reference.

    The ids of every piece of the vocabulary are compared. Where `encoder` names gigatoken, raises `ConfigError` for the
    last two; else a difference is reported on the console. Raises it as well for a library that does not read the file.
    """
    if encoder == tokenizer.library:
        return None
    if encoder not in ("auto", "gigatoken"):
        raise _cannot_use(tokenizer, encoder, "does not read this file")
    try:
        encode = gigatoken_encoder(tokenizer)
    except ImportError as error:  # of gigatoken or its dependencies
        if encoder == "auto":
            return None
        raise _cannot_use(tokenizer, encoder, f"does not import ({error})") from error
    except Exception as error:  # the library raises nothing more specific
        reason = f"cannot load it ({next(iter(str(error).splitlines()), error)})"
    else:
        differing = first_difference(tokenizer, probe_texts(tokenizer), encode)
        if differing is None:
            return encode
        reason = f"gives different ids for {differing[:40]!r} than {tokenizer.library}"
    if encoder == "gigatoken":
        raise _cannot_use(tokenizer, encoder, reason)
    if multiprocessing.parent_process() is None:  # once, and not in each worker
        log(f"{tokenizer.path}: gigatoken {reason}; {tokenizer.library} encodes")
    return None


def _cannot_use(tokenizer: Tokenizer, encoder: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{tokenizer.path}: the encoder {encoder} {reason}; expected --encoder auto or {tokenizer.library}"
    )


class FileEncoder:
    """Encodes the documents of one file, by gigatoken until a sample of them shows a difference."""

    def __init__(self, tokenizer: Tokenizer, fast: Encode | None) -> None:
        self.tokenizer = tokenizer
        self._fast = fast
        self._documents = 0
        self.name = "gigatoken" if fast is not None else tokenizer.library

    def encode(self, texts: list[str], parts: int = 1) -> Encoded:
        """The concatenated ids of all documents, each with one EOS and no BOS, and the length of each document.

        A document is so many consecutive texts, which are encoded one by one. Special tokens in a text stay text.
        """
        if self._fast is not None and not self._matches_reference(texts):
            self._fast = None
            self.name = f"gigatoken, but {self.tokenizer.library} from document {self._documents}, where they differ"
        self._documents += len(texts) // parts
        ids, lengths = (self._fast or self.tokenizer.encode_batch)(texts)
        return _append_eos(ids, lengths.reshape(-1, parts).sum(axis=1), self.tokenizer.eos_id)

    def _matches_reference(self, texts: list[str]) -> bool:
        assert self._fast is not None
        sample = [text[:_CHECK_CHARACTERS] for text in texts[::_CHECK_STRIDE]]
        return first_difference(self.tokenizer, sample, self._fast) is None


def _append_eos(ids: np.ndarray, lengths: np.ndarray, eos_id: int) -> Encoded:
    is_text = np.ones(len(ids) + len(lengths), dtype=bool)
    is_text[np.cumsum(lengths + 1) - 1] = False
    marked = np.full(len(is_text), eos_id, dtype=np.int64)
    marked[is_text] = ids
    return marked, lengths + 1
