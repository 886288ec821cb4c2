"""Training a tokenizer on text: sentencepiece with Llama 2's settings, or byte-level BPE as Llama 3 has it."""

import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from pathlib import Path

from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.layout import SPECIAL_TOKENS
from tinyllama_ds.outputs import write_file

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2  # of a sentencepiece model made here, as in Llama 2's
_BPE_SPECIAL = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}  # Llama 3's
_COVERAGE = 0.99995  # of the characters of a text, by pieces of their own; Llama 2's
_LEAST_COVERAGE = 0.98  # that sentencepiece accepts
_NOT_FROM_TEXT = 256 + 3  # pieces: the bytes, unk, bos and eos
MAX_BYTES = 20_000_000


def train_tokenizer(texts: Iterable[str], vocab_size: int, output: Path, max_bytes: int = MAX_BYTES) -> Tokenizer:
    """Train a sentencepiece BPE model with Llama's settings on up to `max_bytes` of text, and write it to `output`.

    Byte fallback, digits split, no normalisation, a dummy space before the text, runs of spaces kept
    (the trainer specification inside Llama 2's own tokenizer.model). Where the text has more different characters than
    there are pieces, the frequent ones get half of the pieces, and the others are bytes.

    Raises `ConfigError` where too few of them would have a piece, or the text is too short for so many pieces.
    """
    import sentencepiece

    model, lines = io.BytesIO(), list(_lines(texts, max_bytes))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            character_coverage=_coverage(lines, vocab_size),
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


def _coverage(lines: Sequence[str], vocab_size: int) -> float:
    """The share of the characters of a text that have pieces of their own."""
    counts = Counter(chain.from_iterable(lines))
    room = vocab_size - _NOT_FROM_TEXT
    if len(counts) <= room:
        return _COVERAGE
    covered = [number / counts.total() for number in accumulate(count for _, count in counts.most_common(room))]
    if covered[-1] < _LEAST_COVERAGE:
        raise ConfigError(
            f"training a tokenizer with {vocab_size} pieces failed: the text has {len(counts):,} different characters;"
            " expected a larger --vocab-size, or --type bpe"
        )
    return min(_COVERAGE, max(_LEAST_COVERAGE, covered[room // 2]))


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
