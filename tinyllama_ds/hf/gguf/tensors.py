"""The tensors of a GGUF file: their names, their order of rows, and which of them are quantised."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tinyllama_ds.hf.weights import Shapes, parameter_shapes
from tinyllama_ds.model.config import LlamaConfig

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader

BLOCK = 32  # weights of a row that share a scale
_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUANTIZATIONS = ("f16", "q8_0", "q4_0")


def gguf_names(shapes: Shapes, config: LlamaConfig) -> dict[str, str]:
    """GGUF's name of every parameter."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    known = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    found = {name: known.get_name(name, try_suffixes=(".weight",)) for name in shapes}
    return {name: other for name, other in found.items() if other is not None}


def gguf_types(shapes: Shapes, quantization: str, config: LlamaConfig) -> dict[str, "GGMLQuantizationType"]:
    """The type of every parameter.

    Norms are in fp32, and rows that are not a multiple of `BLOCK` in f16. With q4_0 the LM head, or the table that is
    one, has 8 bits: llama.cpp keeps 6 there, for which the gguf package has no quantiser.
    """
    from gguf import GGMLQuantizationType as Type

    head = _TABLE if config.tie_word_embeddings else _HEAD

    def type_of(name: str, shape: torch.Size) -> Type:
        if len(shape) == 1:
            return Type.F32
        if quantization == "f16" or shape[-1] % BLOCK:
            return Type.F16
        return Type.Q4_0 if quantization == "q4_0" and name != head else Type.Q8_0

    return {name: type_of(name, shape) for name, shape in shapes.items()}


def stored_bytes(shape: torch.Size, kind: "GGMLQuantizationType") -> int:
    """The size of a tensor in the file."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return shape.numel() // block * size


def to_gguf(name: str, tensor: Tensor, kind: "GGMLQuantizationType", config: LlamaConfig) -> np.ndarray:
    """A parameter as the file has it. Queries and keys are rotated in neighbouring pairs there, here in halves."""
    from gguf import quantize

    heads = _heads(name, config)
    wide = tensor.detach().float()
    if heads:
        wide = wide.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return quantize(wide.contiguous().numpy(), kind)


def read_parameters(reader: "GGUFReader", config: LlamaConfig) -> Iterator[tuple[str, Tensor, str]]:
    """The parameters of a file under our names, dequantised, in fp32, and the name of the type that each has there.

    Raises KeyError where one is missing, RuntimeError for a wrong shape.
    """
    from gguf import dequantize

    shapes = parameter_shapes(config)
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, other in gguf_names(shapes, config).items():
        stored = found[other]
        tensor = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        heads = _heads(name, config)
        if heads:
            tensor = tensor.view(heads, -1, 2, tensor.shape[-1]).transpose(1, 2).flatten(0, 2)
        yield name, tensor.view(shapes[name]), stored.tensor_type.name


def _heads(name: str, config: LlamaConfig) -> int:
    """Of a parameter whose rows are in a different order; 0 for others."""
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else 0
