"""Weights in safetensors files, written and read tensor by tensor, so that a model is never in memory as a whole.

The format (https://github.com/huggingface/safetensors): the header's length as 8 bytes, the header in JSON, the bytes
of the tensors one after another. The library writes it from a whole dictionary only; it reads what is written here.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import LlamaForCausalLM

INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_SIZE = "50GB"  # transformers' default
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

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

    The tensors come in any order and in one dtype. `max_shard_size` is bytes or a text such as "5GB".

    Raises `ConfigError` for an invalid size, ValueError for tensors that do not match `shapes`.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = iter(tensors)
    first = next(tensors)
    dtype = first[1].dtype
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    try:
        plan = split_torch_state_dict_into_shards(
            empty, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ConfigError(f"--max-shard-size {max_shard_size}: expected a size such as 5GB or 500MB") from error
    digests = {}
    with ExitStack() as opened:
        places: dict[str, tuple[BinaryIO, int]] = {}
        for file_name, names in plan.filename_to_tensors.items():
            new = opened.enter_context((folder / file_name).open("xb"))
            places |= _write_header(new, {name: empty[name] for name in names})
        for name, tensor in chain([first], tensors):
            if (tensor.shape, tensor.dtype) != (empty[name].shape, dtype):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {empty[name]}")
            file, offset = places.pop(name)
            content = _bytes_of(tensor)
            file.seek(offset)
            file.write(content)
            digests[name] = hashlib.sha256(content).hexdigest()
    if places:
        raise ValueError(f"missing tensors: {', '.join(places)}")
    if plan.is_sharded:
        metadata = plan.metadata | {"total_parameters": sum(shape.numel() for shape in shapes.values())}
        index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return WeightsInfo(dtype, digests)


def _write_header(file: BinaryIO, tensors: Mapping[str, Tensor]) -> dict[str, tuple[BinaryIO, int]]:
    """Returns the file and offset of each tensor's bytes."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: (file, 8 + len(text) + header[name]["data_offsets"][0]) for name in tensors}


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().view(torch.uint8).numpy().data.cast("B")


def digest(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's bytes, as `write_weights` gives it."""
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()


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
