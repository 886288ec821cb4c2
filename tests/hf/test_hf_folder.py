"""A Hugging Face folder that a user names loads whole, or is refused in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf.convert import export, load_hf_folder
from tinyllama_ds.model.config import model_config
from tinyllama_ds.model.llama import build_model

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder, model = tmp_path_factory.mktemp("hf") / "whole", build_model(model_config("test"), "sdpa", 1)
    export(iter(model.state_dict().items()), model.config, tokenizer, folder)
    return folder


def lose_a_tensor(weights: Path) -> None:
    tensors = load_file(weights)
    tensors.pop("model.norm.weight")
    save_file(tensors, weights, metadata={"format": "pt"})


def of_another_shape(config: Path) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 32}))


DAMAGES: dict[str, Damage] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "list": lambda path: path.write_bytes(b"[]"),
    "number": lambda path: path.write_bytes(b"1"),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "deep": lambda path: path.write_bytes(100_000 * b"["),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}
CASES = [(file, damage) for file in ("config.json", "model.safetensors") for damage in DAMAGES.items()]


@pytest.mark.parametrize(("file", "damage"), CASES, ids=lambda case: case if isinstance(case, str) else case[0])
def test_a_damaged_folder_is_rejected(file: str, damage: tuple[str, Damage], whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "hf"))
    damage[1](folder / file)
    refuse(folder)


@pytest.mark.parametrize(("file", "damage"), [("model.safetensors", lose_a_tensor), ("config.json", of_another_shape)])
def test_other_weights_than_the_config_says_are_rejected(
    file: str, damage: Damage, whole: Path, tmp_path: Path
) -> None:
    """transformers would draw what is missing by chance."""
    folder = Path(shutil.copytree(whole, tmp_path / "hf"))
    damage(folder / file)
    refuse(folder)


def refuse(folder: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_hf_folder(folder)
    assert str(error.value).startswith(f"{folder}: ")
    assert "\n" not in str(error.value)


def test_a_whole_folder_loads(whole: Path) -> None:
    model, tokenizer = load_hf_folder(whole, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert tokenizer.encode("a")
