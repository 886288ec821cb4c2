"""Both encoders against sentencepiece itself, and the proof that keeps the fast one honest."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from corpora import AWKWARD_TEXTS, made_up_text

from tinyllama_ds.data.tokenizers import encoding
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.encoding import FileEncoder, load_gigatoken
from tinyllama_ds.data.tokenizers.train_tokenizer import BOS_ID, EOS_ID, UNK_ID
from tinyllama_ds.errors import ConfigError

needs_gigatoken = pytest.mark.skipif(
    not (find_spec("gigatoken") and find_spec("awkward")), reason="gigatoken, or what it needs, is not installed"
)
ENCODERS = ["sentencepiece", pytest.param("gigatoken", marks=needs_gigatoken)]


def file_encoder(tokenizer: Tokenizer, name: str) -> FileEncoder:
    return FileEncoder(tokenizer, load_gigatoken(tokenizer, name))


@pytest.mark.parametrize("name", ENCODERS)
def test_documents_are_sentencepieces_ids_and_one_eos(tokenizer: Tokenizer, texts: list[str], name: str):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    encoder = file_encoder(tokenizer, name)
    ids, lengths = encoder.encode(texts)
    expected = [[*reference.encode(text), EOS_ID] for text in texts]
    assert encoder.name == name
    assert lengths.tolist() == [len(document) for document in expected]
    assert ids.tolist() == [token for document in expected for token in document]


@pytest.mark.parametrize("name", ENCODERS)
def test_no_text_becomes_a_control_token(tokenizer: Tokenizer, texts: list[str], name: str):
    ids, lengths = file_encoder(tokenizer, name).encode([*texts, "</s>", "<s>", "<unk>"])
    assert (ids == EOS_ID).sum() == len(lengths)
    assert not ((ids == BOS_ID) | (ids == UNK_ID)).any()


@pytest.mark.parametrize("name", ENCODERS)
def test_no_document_is_no_token(tokenizer: Tokenizer, name: str):
    ids, lengths = file_encoder(tokenizer, name).encode([])
    assert len(ids) == len(lengths) == 0


@needs_gigatoken
def test_gigatoken_is_equal_on_llama_2s_vocabulary(llama2_tokenizer: Tokenizer):
    """Source code of this test's own libraries, and what encoders tend to get wrong."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files] + AWKWARD_TEXTS
    fast = load_gigatoken(llama2_tokenizer, "gigatoken")
    assert fast is not None
    ids, lengths = fast(texts)
    expected_ids, expected_lengths = llama2_tokenizer.encode_batch(texts)
    assert np.array_equal(lengths, expected_lengths)
    assert np.array_equal(ids, expected_ids)


def wrong_from(document: int, tokenizer: Tokenizer):
    """An encoder that is right until it sees the given document."""

    def encode(texts: list[str]):
        ids, lengths = tokenizer.encode_batch(texts)
        if any(text.startswith(f"{document} ") for text in texts):
            ids = ids + 1
        return ids, lengths

    return encode


def test_a_difference_in_the_sample_changes_to_sentencepiece_and_says_so(tokenizer: Tokenizer):
    texts = [f"{number} {made_up_text(number, 30)}" for number in range(200)]
    encoder = FileEncoder(tokenizer, wrong_from(128, tokenizer))
    batches = [encoder.encode(texts[start : start + 64]) for start in range(0, 200, 64)]
    assert encoder.name == "gigatoken, but sentencepiece from document 128, where they differ"
    expected, _ = FileEncoder(tokenizer, None).encode(texts)
    assert np.array_equal(np.concatenate([ids for ids, _ in batches]), expected)


def test_an_encoder_that_fails_the_probes_is_never_used(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    def lossy(tokenizer: Tokenizer):
        return lambda texts: tokenizer.encode_batch([text.strip() for text in texts])

    monkeypatch.setattr(encoding, "gigatoken_encoder", lossy)
    assert load_gigatoken(tokenizer, "auto") is None
    with pytest.raises(ConfigError, match="gives different ids for .* than sentencepiece"):
        load_gigatoken(tokenizer, "gigatoken")


@pytest.mark.parametrize("module", ["gigatoken", "awkward"])
def test_an_encoder_that_does_not_import_is_rejected_only_where_it_was_asked_for(
    module: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """gigatoken itself, or what it needs: a wheel that was installed without its dependencies."""
    monkeypatch.setitem(sys.modules, module, None)
    assert load_gigatoken(tokenizer, "auto") is None
    with pytest.raises(ConfigError, match="does not import"):
        load_gigatoken(tokenizer, "gigatoken")
