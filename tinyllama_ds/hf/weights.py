"""Weights in safetensors files, as transformers names and divides them."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import LlamaForCausalLM

if TYPE_CHECKING:
    from huggingface_hub import StateDictSplit

INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_SIZE = "5GB"  # of huggingface_hub

Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class WeightsInfo:
    """What `write_weights` has written."""

    dtype: torch.dtype
    digests: dict[str, str]  # the SHA-256 of every tensor's bytes


def parameter_shapes(config: LlamaConfig) -> Shapes:
    """The name and shape of every parameter, in the order of the model."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shapes: Shapes, max_shard_size: int | str
) -> WeightsInfo:
    """Write `model.safetensors`, or numbered shards and their index, as transformers names them.

    The tensors come in any order and in one dtype. `max_shard_size` is bytes or a text such as "5GB". A shard is
    written once all its tensors have come: in the order of the model, one shard at most is in memory, and of mapped
    tensors nothing.

    Raises `ConfigError` for an invalid size, ValueError for tensors that do not match `shapes`.
    """
    tensors = iter(tensors)
    first = next(tensors)
    dtype = first[1].dtype
    plan = _plan_shards(shapes, dtype, max_shard_size)
    digests = {}
    shards: dict[str, dict[str, Tensor]] = defaultdict(dict)  # that are not whole yet
    for name, tensor in chain([first], tensors):
        if (tensor.shape, tensor.dtype) != (shapes[name], dtype):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {tuple(shapes[name])}")
        digests[name] = digest(tensor)
        file = plan.tensor_to_filename[name]
        shards[file][name] = tensor.detach().contiguous()
        if len(shards[file]) == len(plan.filename_to_tensors[file]):
            save_tensors(folder / file, shards.pop(file))
    if shapes.keys() != digests.keys():
        raise ValueError(f"missing tensors: {', '.join(shapes.keys() - digests.keys())}")
    if plan.is_sharded:
        metadata = plan.metadata | {"total_parameters": sum(shape.numel() for shape in shapes.values())}
        index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return WeightsInfo(dtype, digests)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, for all who may read its folder: safetensors' own files are this user's alone."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    with suppress(OSError):  # storage without modes
        path.chmod(path.parent.stat().st_mode & 0o666)


def _plan_shards(shapes: Shapes, dtype: torch.dtype, max_shard_size: int | str) -> "StateDictSplit":
    from huggingface_hub import split_torch_state_dict_into_shards

    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    try:
        return split_torch_state_dict_into_shards(
            empty, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ConfigError(f"--max-shard-size {max_shard_size}: expected a size such as 5GB or 500MB") from error


def digest(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's bytes, as `write_weights` gives it."""
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().data).hexdigest()


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, mapped from it for as long as the tensor lives."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file; raises `ConfigError` where it is not one, or truncated."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file ({error})") from error
