"""Sentencepiece models of other kinds than Llama's, for tests."""

import io
from pathlib import Path

import sentencepiece
from corpora import made_up_text

LLAMAS = {
    "vocab_size": 400,
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "minloglevel": 2,
}


def train(path: Path, **settings: object) -> Path:
    """A model with Llama's settings but for these."""
    text, model = made_up_text(3, 3000) + " <sep> [INST] ", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=model, **(LLAMAS | settings)
    )
    path.write_bytes(model.getvalue())
    return path
