"""Training a tokenizer on text: sentencepiece with Llama 2's settings, or byte-level BPE as Llama 3 has it."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.layout import SPECIAL_TOKENS
from tinyllama_ds.outputs import write_file

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2  # of a sentencepiece model made here, as in Llama 2's
_BPE_SPECIAL = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}  # Llama 3's
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


def train_bpe(texts: Iterable[str], vocab_size: int, output: Path, max_bytes: int = MAX_BYTES) -> Tokenizer:
    """Train byte-level BPE, digits split, on up to `max_bytes` of text; write it to `output`, and next to it the file
    that names its special tokens.

    Raises `ConfigError` where the text has too few different words for so many pieces.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_BPE_SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(_lines(texts, max_bytes), trainer)
    if fast.get_vocab_size() < vocab_size:
        raise ConfigError(
            f"training a tokenizer with {vocab_size} pieces failed: the text gives {fast.get_vocab_size()}; expected"
            " more text, or a smaller --vocab-size"
        )
    write_file(output.with_name(SPECIAL_TOKENS), f"{json.dumps(_BPE_SPECIAL, indent=2)}\n")
    write_file(output, fast.to_str())
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
