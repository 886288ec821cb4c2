"""The tokenizer against sentencepiece itself."""

import re
from pathlib import Path

import pytest
import vocabularies
from corpora import made_up_text

from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.data.tokenizers.train_tokenizer import train_tokenizer
from tinyllama_ds.errors import ConfigError


def test_decoding_gives_the_text_back(tokenizer: Tokenizer, texts: list[str]):
    for text in texts:
        if "\u2581" not in text:  # sentencepiece's own mark for a space
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_padded_rows_have_no_text(tokenizer: Tokenizer):
    """A model that has not learned yet gives them, too."""
    ids = tokenizer.encode("the model")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, tokenizer.eos_id, 10**6]) == "the model"


def test_training_follows_llamas_settings(tokenizer: Tokenizer):
    processor = tokenizer.processor
    assert tokenizer.vocab_size == 512
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, 1, 2, -1)
    assert all(processor.is_byte(number) for number in range(3, 259))
    assert processor.encode("777", out_type=str) == ["▁", "7", "7", "7"]  # digits one by one


def test_training_is_deterministic(tokenizer: Tokenizer, tmp_path: Path):
    again = train_tokenizer([made_up_text(seed, 1500) for seed in range(10)], 512, tmp_path / "again.model")
    assert again.sha256 == tokenizer.sha256


def test_training_stops_at_its_share_of_text(tmp_path: Path):
    def texts():
        yield made_up_text(0, 1500)
        yield made_up_text(1, 1500)
        raise AssertionError("read on after max_bytes")

    assert train_tokenizer(texts(), 300, tmp_path / "t.model", max_bytes=10_000).vocab_size == 300


def lines_of_characters(characters: list[str], counts: list[int]) -> str:
    text = "".join(character * count for character, count in zip(characters, counts, strict=True))
    return "\n".join(text[start::300] for start in range(300))


def test_rare_characters_are_bytes_where_there_are_more_than_pieces(tmp_path: Path):
    """As in Chinese text and a small vocabulary."""
    characters = [chr(0x4E00 + number) for number in range(300)]
    text = lines_of_characters(characters, [1 + 100_000 // rank**2 for rank in range(1, 301)])
    trained = train_tokenizer([text], 512, tmp_path / "t.model")
    pieces = set(trained.pieces)
    assert {*characters[:100]} <= pieces
    assert characters[-1] not in pieces
    assert trained.decode(trained.encode("".join(characters))) == "".join(characters)


def test_more_frequent_characters_than_pieces_are_rejected(tmp_path: Path):
    text = lines_of_characters([chr(0x4E00 + number) for number in range(1000)], [30] * 1000)
    with pytest.raises(ConfigError, match=r"512 pieces failed: the text has 1,000 different .* a larger --vocab-size"):
        train_tokenizer([text], 512, tmp_path / "t.model")


def test_too_little_text_is_rejected_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(ConfigError, match="training a tokenizer with 5000 pieces failed"):
        train_tokenizer(["a few words"], 5000, tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_foreign_file_is_rejected(tmp_path: Path):
    with pytest.raises(ConfigError, match="the tokenizer is missing"):
        load_tokenizer(tmp_path / "absent.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(ConfigError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "text.model")


def test_special_ids_are_the_models_own(tmp_path: Path):
    path = vocabularies.train(tmp_path / "t.model", unk_id=2, bos_id=-1, eos_id=1, pad_id=0)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, None, 1, 0)
    assert tokenizer.end_of_document == "one EOS (id 1) after each document, no BOS"


def test_a_model_without_an_end_of_sequence_is_rejected(tmp_path: Path):
    with pytest.raises(ConfigError, match="t.model: has no eos piece; expected one, which separates documents"):
        load_tokenizer(vocabularies.train(tmp_path / "t.model", eos_id=-1))


NO_MODELS = {
    "empty": (lambda content: b"", "is empty; expected a sentencepiece model"),
    "cut short": (lambda content: content[:-7], "not a sentencepiece model, or a truncated one"),
    "half": (lambda content: content[: len(content) // 2], "not a sentencepiece model, or a truncated one"),
    "zeros": (lambda content: bytes(len(content)), "not a sentencepiece model, it begins with NUL bytes"),
    "JSON": (lambda content: b'{\n "version": "1.0"}', "not a tokenizer.json, it is damaged or has no model"),
    "LFS": (
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid",
        "but a Git LFS pointer to one; run git lfs",
    ),
}


@pytest.mark.parametrize("case", NO_MODELS)
def test_a_file_that_is_no_model_is_rejected_with_the_reason(tokenizer: Tokenizer, tmp_path: Path, case: str):
    spoil, sentence = NO_MODELS[case]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(spoil(tokenizer.files["tokenizer.model"]))
    with pytest.raises(ConfigError, match=f"{path}: .*{re.escape(sentence)}"):
        load_tokenizer(path)


def test_a_folder_is_no_model(tmp_path: Path):
    with pytest.raises(ConfigError, match="the tokenizer is missing"):
        load_tokenizer(tmp_path)


def test_texts_that_cannot_be_read_leave_nothing(tmp_path: Path):
    def texts():
        yield made_up_text(0, 1500)
        raise ConfigError("no more")

    with pytest.raises(ConfigError, match="no more"):
        train_tokenizer(texts(), 300, tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []
