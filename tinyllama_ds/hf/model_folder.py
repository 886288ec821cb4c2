"""A model folder: imported weights, from which a run can start (`pretrain --init-from`).

model.json         the shapes, the dtype, and size and SHA-256 of the files
model.safetensors  all tensors, under Hugging Face's names
tokenizer.model    sentencepiece's; or tokenizer.json and special_tokens_map.json
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel
from torch import Tensor

from tinyllama_ds.config.validation import expectation, validate_json
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer, write_tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import parse_row, sha256_of, write_object
from tinyllama_ds.hf.weights import WeightsInfo, parameter_shapes, read_tensor, tensor_names, write_weights
from tinyllama_ds.inputs import read_text
from tinyllama_ds.layout import SPECIAL_TOKENS, TOKENIZER_JSON, TOKENIZER_MODEL
from tinyllama_ds.model.config import LlamaConfig, dtype_name

MODEL_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
_CONTENTS = ({WEIGHTS_FILE, TOKENIZER_MODEL}, {WEIGHTS_FILE, TOKENIZER_JSON, SPECIAL_TOKENS})
FORMAT = 1  # of model.json


def _has_both_files(files: dict) -> dict:
    if files.keys() not in _CONTENTS:
        raise expectation(" or ".join(", ".join(sorted(names)) for names in _CONTENTS))
    return files


class _File(BaseModel):
    size: int
    sha256: str


class _Description(BaseModel):
    """What `model.json` holds."""

    format: int
    model: LlamaConfig
    dtype: Literal["float32", "bfloat16", "float16"]
    files: Annotated[dict[str, _File], AfterValidator(_has_both_files)]


@dataclass(frozen=True)
class ModelFolder:
    """A model by its `model.json`; its files are not verified yet."""

    path: Path
    model: LlamaConfig
    dtype: torch.dtype
    files: dict[str, dict]  # size in bytes and SHA-256 of each

    @property
    def weights_sha256(self) -> str:
        return self.files[WEIGHTS_FILE]["sha256"]

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises `ConfigError` unless its files have the recorded SHA-256."""
        tokenizer = load_tokenizer(self.path)
        for name, content in tokenizer.files.items():
            if hashlib.sha256(content).hexdigest() != self.files.get(name, {}).get("sha256"):
                raise ConfigError(f"{self.path / name}: is not the tokenizer of this model folder, by its SHA-256")
        return tokenizer

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters in the order of the model, each mapped from the file for as long as it lives."""
        for name in parameter_shapes(self.model):
            yield name, read_tensor(self.path / WEIGHTS_FILE, name)


def is_model_folder(path: Path) -> bool:
    """Whether this is what `write_model_folder` writes."""
    return (path / MODEL_FILE).is_file()


def write_model_folder(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], model: LlamaConfig, tokenizer: Tokenizer
) -> WeightsInfo:
    """Fill an empty folder; the tensors come one by one, in one dtype."""
    written = write_weights(folder, tensors, parameter_shapes(model), max_shard_size=sys.maxsize)
    write_tokenizer(tokenizer, folder)
    files = {name: _identity(folder / name) for name in (WEIGHTS_FILE, *tokenizer.files)}
    described = {"format": FORMAT, "model": model.to_dict(), "dtype": dtype_name(written.dtype), "files": files}
    write_object(folder / MODEL_FILE, described)
    return written


def open_model_folder(path: Path) -> ModelFolder:
    """The folder by its `model.json`; raises `ConfigError` where there is none or a later version wrote it."""
    file = path / MODEL_FILE
    content = read_text(file, "the description of a model folder")
    version = (parse_row(content.encode(), format=int) or {}).get("format", FORMAT)
    if version > FORMAT:
        raise ConfigError(f"{file}: has format {version} and is known up to {FORMAT}; use the version that wrote it")
    found = validate_json(_Description, content, file)
    files = {name: identity.model_dump() for name, identity in found.files.items()}
    return ModelFolder(path, found.model, getattr(torch, found.dtype), files)


def verify_model_folder(folder: ModelFolder) -> None:
    """Raises `ConfigError`, naming the file, unless both files are complete and undamaged. Reads every byte."""
    for name, expected in folder.files.items():
        path = folder.path / name
        if not path.is_file() or _identity(path) != expected:
            raise ConfigError(f"{path}: is missing or damaged; its size or SHA-256 is not the one in {MODEL_FILE}")
    shapes = parameter_shapes(folder.model)
    if set(tensor_names(folder.path / WEIGHTS_FILE)) != set(shapes):
        raise ConfigError(f"{folder.path / WEIGHTS_FILE}: does not hold the tensors of the model in {MODEL_FILE}")


def _identity(path: Path) -> dict:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}
