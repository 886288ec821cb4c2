"""A model folder: weights that came from elsewhere, as a run starts from them (`pretrain --init-from`).

model.json         the shapes, the dtype, and size and SHA-256 of the files
model.safetensors  all tensors, under Hugging Face's names
tokenizer.model    sentencepiece's
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinyllama_ds.data.tokenizer import TOKENIZER_FILE, Tokenizer, stored_tokenizer
from tinyllama_ds.data.typed import from_json
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf.weights import DTYPES, WeightsInfo, parameter_shapes, read_tensor, tensor_names, write_weights
from tinyllama_ds.model.config import LlamaConfig

MODEL_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
_FILES = (WEIGHTS_FILE, TOKENIZER_FILE)
FORMAT = 1  # of model.json
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class _Identity:
    size: int
    sha256: str


@dataclass(frozen=True)
class ModelFolder:
    """What `model.json` says. Nothing of it is verified yet."""

    path: Path
    model: LlamaConfig
    dtype: torch.dtype
    files: dict[str, dict]  # size in bytes and SHA-256 of each

    @property
    def weights_sha256(self) -> str:
        return self.files[WEIGHTS_FILE]["sha256"]

    @property
    def tokenizer(self) -> Tokenizer:
        return stored_tokenizer(self.path / TOKENIZER_FILE, self.files[TOKENIZER_FILE]["sha256"], "this model folder")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters in the order of the model, each mapped from the file for as long as it lives."""
        for name in parameter_shapes(self.model):
            yield name, read_tensor(self.path / WEIGHTS_FILE, name)


def is_model_folder(path: Path) -> bool:
    """Whether this is what `write_model_folder` writes."""
    return (path / MODEL_FILE).is_file()


def write_model_folder(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], model: LlamaConfig, tokenizer: Path
) -> WeightsInfo:
    """Fill an empty folder; the tensors come one by one, in one dtype."""
    written = write_weights(folder, tensors, parameter_shapes(model), max_shard_size=sys.maxsize)
    shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
    files = {name: _identity(folder / name) for name in _FILES}
    dtype = str(written.dtype).removeprefix("torch.")
    said = {"format": FORMAT, "model": model.to_dict(), "dtype": dtype, "files": files}
    (folder / MODEL_FILE).write_text(json.dumps(said, indent=1) + "\n")
    return written


def open_model_folder(path: Path) -> ModelFolder:
    """The folder by its `model.json`; raises `ConfigError` where there is none or a later version wrote it."""
    file = path / MODEL_FILE
    try:
        raw = json.loads(file.read_bytes())
        if raw["format"] > FORMAT:
            raise ConfigError(f"{file}: has format {raw['format']} and is known up to {FORMAT}; use what wrote it")
        said = {name: from_json(_Identity, raw["files"][name], name) for name in _FILES}
        model = from_json(LlamaConfig, raw["model"], "model")
        return ModelFolder(path, model, _DTYPES[raw["dtype"]], {name: asdict(file) for name, file in said.items()})
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: is no model folder, it has no {MODEL_FILE}; expected what `import` wrote"
        ) from error
    except ConfigError as config_error:
        raise (
            config_error if str(file) in str(config_error) else ConfigError(f"{file}: {config_error}")
        ) from config_error
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"{file}: not the description of a model folder ({repr(error):.200})") from error


def verify_model_folder(folder: ModelFolder) -> None:
    """Raises `ConfigError`, naming the file, unless both files are whole and hold what they have to. Reads every
    byte.
    """
    for name, said in folder.files.items():
        path = folder.path / name
        if not path.is_file() or _identity(path) != said:
            raise ConfigError(f"{path}: is missing or damaged; its size or SHA-256 is not the one in {MODEL_FILE}")
    shapes = parameter_shapes(folder.model)
    if set(tensor_names(folder.path / WEIGHTS_FILE)) != set(shapes):
        raise ConfigError(f"{folder.path / WEIGHTS_FILE}: does not hold the tensors of the model in {MODEL_FILE}")


def _identity(path: Path) -> dict:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
