"""A tokenizer as GGUF stores it: tokens with their types, and the scores or the merges that encode a text.

Nothing in a GGUF file describes how byte-level BPE splits a text into words: it names one of the pre-tokenizers that
llama.cpp has in its code, so that any other tokenizer is rejected.
"""

import json
from dataclasses import dataclass

from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tinyllama_ds.data.tokenizers.vocabulary import SPACE
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.layout import TOKENIZER_JSON

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # types of GGUF, and of sentencepiece, which also has others
_PADDING_SCORE = -10_000.0

_GPT_2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"  # within ByteLevel
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA_3, _QWEN_2 = (_WORDS.replace("DIGITS", digits) for digits in (r"\p{N}{1,3}", r"\p{N}"))
_ONE_DIGIT = r"\p{N}"
# The patterns that split a text one after another, and whether a word that is a piece stays whole in spite of merges.
_PRE_TOKENIZERS = {
    ((_GPT_2,), False): "gpt-2",
    ((_ONE_DIGIT, _GPT_2), False): "smollm",
    ((_LLAMA_3,), True): "llama-bpe",
    ((_LLAMA_3,), False): "smaug-bpe",
    ((_QWEN_2,), False): "qwen2",
}


@dataclass(frozen=True)
class GgufVocabulary:
    """The keys of `tokenizer.ggml`, and one token for every row of the embeddings."""

    model: str  # the kind of tokenizer: llama is sentencepiece, gpt2 is byte-level BPE
    pre: str  # the name of the pre-tokenizer
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None  # of sentencepiece
    merges: list[str] | None = None  # of BPE


def gguf_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> GgufVocabulary:
    """The vocabulary for a model of so many rows of embeddings; rows without a piece become unused tokens.

    Raises `ConfigError` for a tokenizer that llama.cpp does not have.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece(tokenizer, vocab_size)
    return _byte_level(tokenizer, vocab_size)


def _sentencepiece(tokenizer: SentencePieceTokenizer, vocab_size: int) -> GgufVocabulary:
    if not tokenizer.proto.trainer_spec.byte_fallback:
        raise ConfigError(
            f"{tokenizer.path}: has no pieces for bytes, without which llama.cpp cannot encode unknown characters;"
            " expected a vocabulary with byte fallback"
        )
    types = [piece.type for piece in tokenizer.proto.pieces]
    tokens = [
        piece.replace(SPACE, " ") if kind == _USER_DEFINED else piece  # which is searched before spaces are escaped
        for piece, kind in zip(tokenizer.pieces, types, strict=True)
    ]
    padding = _padding(range(len(tokens), vocab_size))
    scores = tokenizer.processor.get_score(list(range(len(tokens))))
    return GgufVocabulary(
        "llama",
        "default",
        tokens + padding,
        types + [_UNUSED] * len(padding),
        scores=scores + [_PADDING_SCORE] * len(padding),
    )


def _byte_level(tokenizer: Tokenizer, vocab_size: int) -> GgufVocabulary:
    described = json.loads(tokenizer.files[TOKENIZER_JSON])
    _reject_other_settings(tokenizer, described)
    tokens = _padding(range(vocab_size))
    types = [_UNUSED] * vocab_size
    for piece, number in described["model"]["vocab"].items():
        tokens[number], types[number] = piece, _NORMAL
    for token in described.get("added_tokens") or []:
        tokens[token["id"]], types[token["id"]] = token["content"], _USER_DEFINED
    control = set(tokenizer.control_tokens())
    types = [_CONTROL if token in control else kind for token, kind in zip(tokens, types, strict=True)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    return GgufVocabulary("gpt2", _pre_tokenizer(tokenizer, described), tokens, types, merges=merges)


def _padding(numbers: range) -> list[str]:
    return [f"[PAD{number}]" for number in numbers]


def _reject_other_settings(tokenizer: Tokenizer, described: dict) -> None:
    model = described["model"]
    symbols = [token for token in described.get("added_tokens") or [] if not token.get("special")]
    unlike = {
        "normalises its text": described.get("normalizer") is not None,
        "has byte fallback": bool(model.get("byte_fallback")),
        "marks the pieces within or at the end of a word": bool(
            model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        ),
        "merges at random (dropout)": bool(model.get("dropout")),
        "has added tokens that take the spaces next to them, or match whole words only": any(
            token.get(option) for token in symbols for option in ("lstrip", "rstrip", "single_word")
        ),
    }
    found = [what for what, is_so in unlike.items() if is_so]
    if found:
        raise ConfigError(
            f"{tokenizer.path}: {' and '.join(found)}, which GGUF has no keys for; expected byte-level BPE as"
            " SmolLM2's or Llama 3's, or export a Hugging Face folder"
        )


def _pre_tokenizer(tokenizer: Tokenizer, described: dict) -> str:
    patterns = _patterns_of(described.get("pre_tokenizer"))
    found = _PRE_TOKENIZERS.get((patterns or (), bool(described["model"].get("ignore_merges"))))
    if found is None:
        raise ConfigError(
            f"{tokenizer.path}: its pre_tokenizer is not one that llama.cpp is known to have"
            f" ({', '.join(_PRE_TOKENIZERS.values())}); export a Hugging Face folder"
        )
    return found


def _patterns_of(pre_tokenizer: dict | None) -> tuple[str, ...] | None:
    """The regular expressions that split a text one after another; None for what splits in a different way."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": [*parts]}:
            patterns = [_patterns_of(part) for part in parts]
            return None if None in patterns else tuple(pattern for found in patterns for pattern in found or ())
        case {"type": "Digits", "individual_digits": True}:
            return (_ONE_DIGIT,)
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", **rest}:
            return None if rest.get("invert") else (pattern,)
        case {"type": "ByteLevel", "add_prefix_space": False, **rest}:
            return (_GPT_2,) if rest.get("use_regex", True) else ()
    return None
