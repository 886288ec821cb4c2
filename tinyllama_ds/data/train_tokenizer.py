"""Training a sentencepiece tokenizer on text, with Llama 2's settings."""

import io
from collections.abc import Iterable
from pathlib import Path

from tinyllama_ds.data.tokenizer import Tokenizer, load_tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.outputs import write_file

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2  # of a sentencepiece model made here, as in Llama 2's
MAX_BYTES = 20_000_000


def train_tokenizer(texts: Iterable[str], vocab_size: int, output: Path, max_bytes: int = MAX_BYTES) -> Tokenizer:
    """Train a sentencepiece BPE model with Llama's settings on up to `max_bytes` of text, and write it to `output`.

    Byte fallback, digits split, no normalisation, a dummy space before the text, runs of spaces kept
    (the trainer specification inside Llama 2's own tokenizer.model).
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, max_bytes),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            character_coverage=0.99995,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4192,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(f"training a tokenizer with {vocab_size} pieces failed: {error}") from error
    write_file(output, model.getvalue())
    return load_tokenizer(output)


def _lines(texts: Iterable[str], max_bytes: int) -> Iterable[str]:
    """Lines of the texts up to a total size; pieces do not go beyond a line."""
    remaining = max_bytes
    for text in texts:
        for line in text.splitlines():
            if line.strip():
                yield line
                remaining -= len(line.encode())
        if remaining <= 0:
            return
