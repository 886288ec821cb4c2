"""The text that a GGUF file is compared on."""

from pathlib import Path

import pytest
import torch

from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.train_tokenizer import train_tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf.gguf.comparison import MAX_TOKENS, sample_text
from tinyllama_ds.model.config import MODEL_SIZES

CONFIG = MODEL_SIZES["test"]  # of 128 positions


def test_a_file_is_read_in_windows_that_meet(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the small llama reads a token. " * 30)
    text = sample_text(path, tokenizer, CONFIG)
    ids = tokenizer.encode(path.read_text())
    assert {len(window) for window in text.windows[:-1]} == {129}
    assert torch.cat([text.windows[0], *(window[1:] for window in text.windows[1:])]).tolist() == ids
    assert text.targets == len(ids) - 1


def test_by_default_it_is_pythons_reference(tokenizer: Tokenizer) -> None:
    text = sample_text(None, tokenizer, CONFIG)
    assert (text.name, text.targets) == ("Python's language reference", MAX_TOKENS)
    assert "assert" in tokenizer.decode(text.windows[0].tolist())


def test_a_data_directory_gives_its_validation_split(data_dir: Path, tokenizer: Tokenizer) -> None:
    text = sample_text(data_dir, tokenizer, CONFIG)
    assert text.name == "validation text of slimpajama, starcoderdata"
    assert {len(window) for window in text.windows} == {129}


def test_others_are_rejected(data_dir: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = train_tokenizer(["a b c d e " * 50], 265, tmp_path / "tokenizer.model")
    with pytest.raises(ConfigError, match="made with a tokenizer other than the model's"):
        sample_text(data_dir, other, CONFIG)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no validation split"):
        sample_text(tmp_path / "empty", tokenizer, CONFIG)
    (tmp_path / "short.txt").write_text("")
    with pytest.raises(ConfigError, match="has less than two tokens"):
        sample_text(tmp_path / "short.txt", tokenizer, CONFIG)
