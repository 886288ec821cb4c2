"""Which tokenizers GGUF can have, under which name, and their tokens."""

import io
from collections.abc import Callable
from pathlib import Path

import fast_folders
import pytest
import sentencepiece

from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.data.tokenizers.train_tokenizer import train_bpe
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf.gguf.vocabulary import gguf_vocabulary

QWEN_2_WORDS = fast_folders.LLAMA_3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def splits(pattern: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTES]}


def unmerged(content: dict) -> None:
    content["model"]["ignore_merges"] = False


NAMES: dict[str, tuple[Callable[[Path], Path], Callable[[dict], object], str]] = {
    "SmolLM2": (fast_folders.smollm2, lambda c: None, "smollm"),
    "Llama 3": (fast_folders.llama_3, lambda c: None, "llama-bpe"),
    "Llama 3 with all merges": (fast_folders.llama_3, unmerged, "smaug-bpe"),
    "Qwen 2": (fast_folders.smollm2, lambda c: c.update(pre_tokenizer=splits(QWEN_2_WORDS)), "qwen2"),
    "GPT-2": (fast_folders.smollm2, lambda c: c.update(pre_tokenizer=BYTES | {"use_regex": True}), "gpt-2"),
    "GPT-2 in an older file": (
        fast_folders.smollm2,
        lambda c: c.update(pre_tokenizer={key: value for key, value in BYTES.items() if key != "use_regex"}),
        "gpt-2",
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_the_name_of_the_pre_tokenizer(case: str, tmp_path: Path) -> None:
    make, edit, name = NAMES[case]
    make(tmp_path)
    fast_folders.change(tmp_path, edit)
    assert gguf_vocabulary(load_tokenizer(tmp_path), 720).pre == name


def test_what_train_tokenizer_makes_has_a_name(tmp_path: Path) -> None:
    assert gguf_vocabulary(train_bpe(fast_folders.TEXT, 300, tmp_path / "tokenizer.json"), 300).pre == "smollm"


UNKNOWN = "its pre_tokenizer is not one that llama.cpp is known to have (gpt-2, smollm, llama-bpe, smaug-bpe, qwen2)"
REJECTED: dict[str, tuple[Callable[[dict], object], str]] = {
    "another pattern": (lambda c: c.update(pre_tokenizer=splits(r"\w+|\W")), UNKNOWN),
    "a space before a text": (
        lambda c: c.update(pre_tokenizer=BYTES | {"add_prefix_space": True, "use_regex": True}),
        UNKNOWN,
    ),
    "words": (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), UNKNOWN),
    "none": (lambda c: c.update(pre_tokenizer=None), UNKNOWN),
    "normalisation": (lambda c: c.update(normalizer={"type": "NFC"}), "normalises its text, which GGUF has no keys"),
    "dropout": (lambda c: c["model"].update(dropout=0.1), "merges at random (dropout), which GGUF has no keys for"),
    "greedy symbols": (
        lambda c: c["added_tokens"].append(c["added_tokens"][0] | {
            "id": len(c["model"]["vocab"]), "content": "<x>", "special": False, "rstrip": True}),
        "has added tokens that take the spaces next to them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_others_are_rejected(case: str, tmp_path: Path) -> None:
    edit, sentence = REJECTED[case]
    fast_folders.smollm2(tmp_path)
    fast_folders.change(tmp_path, edit)
    with pytest.raises(ConfigError) as error:
        gguf_vocabulary(load_tokenizer(tmp_path), 720)
    assert sentence in str(error.value)


def trained_sentencepiece(path: Path, **settings: object) -> Path:
    """A sentencepiece model that is Llama's but for some settings."""
    model = io.BytesIO()
    llamas = {"model_type": "bpe", "vocab_size": 290, "byte_fallback": True, "normalization_rule_name": "identity"}
    llamas |= {"remove_extra_whitespaces": False, "minloglevel": 2}
    text = iter([*"\n".join(fast_folders.TEXT).splitlines(), "an [INST] in it"])
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=text, model_writer=model, **(llamas | settings))
    path.write_bytes(model.getvalue())
    return path


def test_a_vocabulary_without_bytes_is_rejected(tmp_path: Path) -> None:
    path = trained_sentencepiece(tmp_path / "tokenizer.model", byte_fallback=False, vocab_size=50)
    with pytest.raises(ConfigError, match="has no pieces for bytes"):
        gguf_vocabulary(load_tokenizer(path), 300)


def test_the_tokens_of_sentencepiece(tokenizer: Tokenizer) -> None:
    found = gguf_vocabulary(tokenizer, 520)
    assert (found.model, found.pre, found.merges) == ("llama", "default", None)
    assert found.tokens[:3] == ["<unk>", "<s>", "</s>"]
    assert found.tokens[512:] == [f"[PAD{number}]" for number in range(512, 520)]
    assert found.types[:3] == [2, 3, 3]
    assert found.types[found.tokens.index("<0x0A>")] == 6
    assert found.types[found.tokens.index("▁token")] == 1
    assert found.types[512:] == [5] * 8
    assert found.scores is not None
    assert found.scores[found.tokens.index("▁token")] > -10_000 == found.scores[-1]


def test_symbols_are_searched_as_the_text_has_them(tmp_path: Path) -> None:
    path = trained_sentencepiece(tmp_path / "tokenizer.model", user_defined_symbols=["▁[INST]"])
    found = gguf_vocabulary(load_tokenizer(path), 300)
    assert found.types[found.tokens.index(" [INST]")] == 4


def test_the_tokens_of_byte_level_bpe(tmp_path: Path) -> None:
    fast_folders.smollm2(tmp_path, 600)
    fast_folders.change(
        tmp_path,
        lambda c: c["added_tokens"].append(c["added_tokens"][0] | {"id": 600, "content": "<call>", "special": False}),
    )
    tokenizer = load_tokenizer(tmp_path)
    found = gguf_vocabulary(tokenizer, 610)
    assert (found.model, found.scores) == ("gpt2", None)
    assert (found.tokens[0], found.types[0]) == ("<|endoftext|>", 3)
    assert (found.tokens[600], found.types[600]) == ("<call>", 4)
    assert (found.tokens[601], found.types[601:]) == ("[PAD601]", [5] * 9)
    assert found.types[found.tokens.index("Ġthe")] == 1
    assert len(set(found.tokens)) == 610
    assert found.merges is not None
    assert all(merge.count(" ") == 1 for merge in found.merges)
