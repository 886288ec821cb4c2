"""What a model folder is, and which of them a run may start from."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tinyllama_ds.checkpoint.initial_weights import open_initial_weights
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf.model_folder import open_model_folder, verify_model_folder, write_model_folder
from tinyllama_ds.model.config import MODEL_SIZES
from tinyllama_ds.model.llama import build_model

CONFIG = MODEL_SIZES["test"]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    write_model_folder(path, build_model(CONFIG, "eager", 1).state_dict().items(), CONFIG, tokenizer)
    return path


def edit(folder: Path, **changes: object) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_to_tokenizer(folder: Path) -> None:
    with (folder / "tokenizer.model").open("ab") as file:
        file.write(b"\x8a\x01\x00")  # an unknown field, empty


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no model": (lambda f: (f / "model.json").unlink(), "model: holds no checkpoint; expected a run directory or"),
    "no folder": (shutil.rmtree, "model: is not a directory; expected an imported model, a run or a checkpoint"),
    "no JSON": (lambda f: (f / "model.json").write_text("{"), "model.json: not valid JSON"),
    "a later format": (lambda f: edit(f, format=2), "has format 2 and is known up to 1; use the version"),
    "another dtype": (lambda f: edit(f, dtype="int8"), 'model.json: dtype is "int8"; expected '),
    "another size": (
        lambda f: edit(f, model=CONFIG.to_dict() | {"intermediate_size": 128}),
        "model: its model has intermediate_size 128; the recipe's has 176",
    ),
    "another tokenizer": (add_to_tokenizer, "model/tokenizer.model: is not the tokenizer of this model folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_others_are_rejected(case: str, folder: Path, tokenizer: Tokenizer) -> None:
    spoil, sentence = CASES[case]
    spoil(folder)
    with pytest.raises(ConfigError) as error:
        open_initial_weights(folder, CONFIG, tokenizer)
    assert sentence in str(error.value)


def test_the_tokenizer_of_the_weights_is_the_datas(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "other.model").write_bytes(tokenizer.files["tokenizer.model"] + b"\x8a\x01\x00")
    with pytest.raises(
        ConfigError, match=r"model/tokenizer.model: is the tokenizer of the weights, and not .*/other.model"
    ):
        open_initial_weights(folder, CONFIG, load_tokenizer(tmp_path / "other.model"))


def test_positions_may_go_further_and_be_interpolated(folder: Path, tokenizer: Tokenizer) -> None:
    further = replace(CONFIG, max_position_embeddings=512, rope_scaling_factor=4.0)
    assert open_initial_weights(folder, further, tokenizer).path == folder


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model"])
def test_a_changed_byte_is_found(name: str, folder: Path) -> None:
    opened = open_model_folder(folder)
    verify_model_folder(opened)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}: is missing or damaged"):
        verify_model_folder(opened)
