"""Folders with a `tokenizer.json`, as SmolLM2's and Llama 3's: imported, exported and used with transformers' ids."""

import json
from dataclasses import replace
from pathlib import Path

import fast_folders
import pytest
import torch
import transformers

from tinyllama_ds.cli import main
from tinyllama_ds.data.chat import Message, prompt_ids
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf.convert import ExportOptions, export
from tinyllama_ds.hf.generate import LoadedModel, Sampling, generate, load_from_hf_folder, load_from_weights
from tinyllama_ds.hf.import_model import import_hf_folder
from tinyllama_ds.hf.model_folder import open_model_folder, verify_model_folder
from tinyllama_ds.model.config import MODEL_SIZES, LlamaConfig
from tinyllama_ds.model.llama import build_model

GREEDY = Sampling(24, 0.0, 1.0, 0)
PROMPT = "the small model reads  42 tokens<|endoftext|>"


@pytest.fixture(params=["smollm2", "llama_3"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return load_tokenizer(getattr(fast_folders, request.param)(tmp_path / "given"))


def shape_of(tokenizer: Tokenizer, padding: int = 0) -> LlamaConfig:
    return replace(MODEL_SIZES["test"], vocab_size=tokenizer.vocab_size + padding)


def weights_of(shape: LlamaConfig) -> dict[str, torch.Tensor]:
    return dict(build_model(shape, "eager", seed=1).state_dict())


def test_out_and_in_again_is_the_same_model_and_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """With padded rows, too; and the exported folder has the ids of training in transformers."""
    shape = shape_of(tokenizer, padding=9)
    weights = weights_of(shape)
    export(weights.items(), shape, tokenizer, tmp_path / "hf", ExportOptions(is_chat_model=True))
    import_hf_folder(tmp_path / "hf", tmp_path / "model")
    ours = open_model_folder(tmp_path / "model")
    verify_model_folder(ours)
    assert (ours.model, ours.tokenizer.sha256) == (shape, tokenizer.sha256)
    assert all(torch.equal(weights[name], tensor) for name, tensor in ours.tensors())
    export(ours.tensors(), shape, ours.tokenizer, tmp_path / "again", ExportOptions(is_chat_model=True))
    names = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert "tokenizer.model" not in names
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.eos_token_id, theirs.bos_token_id) == (tokenizer.eos_id, tokenizer.bos_id)
    assert theirs.encode(PROMPT, split_special_tokens=True) == tokenizer.encode(PROMPT)


def test_greedy_text_is_that_of_the_exported_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shape = shape_of(tokenizer)
    weights = weights_of(shape)
    export(weights.items(), shape, tokenizer, tmp_path / "hf", ExportOptions(is_chat_model=True))
    ours, theirs = (
        load_from_weights(weights, shape, tokenizer, is_chat_model=True),
        load_from_hf_folder(tmp_path / "hf"),
    )
    assert generate(ours, PROMPT, GREEDY) == generate(theirs, PROMPT, GREEDY)
    assert ours.eos_id == theirs.eos_id == tokenizer.eos_id
    question = [Message("user", "the loss (2024)?")]
    for loaded in (ours, theirs):
        assert asks(loaded, question) == prompt_ids(tokenizer, question)


def asks(loaded: LoadedModel, question: list[Message]) -> list[int]:
    assert loaded.encode_chat is not None
    return loaded.encode_chat(question)


def test_a_model_folder_with_a_different_tokenizer_is_rejected(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shape = shape_of(tokenizer)
    export(weights_of(shape).items(), shape, tokenizer, tmp_path / "hf")
    import_hf_folder(tmp_path / "hf", tmp_path / "model")
    path = tmp_path / "model" / "special_tokens_map.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": fast_folders.TEXT[0][0]}))
    with pytest.raises(ConfigError, match="special_tokens_map.json: is not the tokenizer of this model folder"):
        _ = open_model_folder(tmp_path / "model").tokenizer


def test_what_does_not_fit_is_rejected(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = shape_of(tokenizer)
    export(weights_of(shape).items(), shape, tokenizer, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"eos_token_id": [5, 6]}))
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "model")]) == 78
    sentence = f"config.json: eos_token_id is [5, 6]; expected {tokenizer.eos_id}, as in {tmp_path}/hf/tokenizer.json"
    assert sentence in capsys.readouterr().err
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"eos_token_id": [5, tokenizer.eos_id]}))
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "model")]) == 0
