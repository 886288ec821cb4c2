"""The weights of a model folder as the start of a run, in place of random ones (`pretrain --init-from`).

They go in twice. Every rank fills its model with them before DeepSpeed divides it, tensor by tensor from the mapped
file, which the ranks of a host share in memory: a rank holds no more than with random weights. Under bf16 DeepSpeed
then makes its fp32 masters from weights that are already rounded, so the masters are filled again, each rank its part.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tinyllama_ds.data.tokenizer import Tokenizer
from tinyllama_ds.errors import Refusal
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import LlamaForCausalLM
from tinyllama_ds.model_folder import MODEL_FILE, ModelFolder, open_model_folder
from tinyllama_ds.training.reshape import stage_0_masters

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def open_initial_weights(path: Path, model: LlamaConfig, name: str, tokenizer: Path) -> ModelFolder:
    """The folder, after its shapes and its tokenizer were found to be the run's.

    How far positions go, and by what they are divided, may differ: that is what position interpolation changes.
    Raises `Refusal`.
    """
    folder = open_model_folder(path)
    positions = {key: getattr(model, key) for key in ("max_position_embeddings", "rope_scaling_factor")}
    there, here = replace(folder.model, **positions).to_dict(), model.to_dict()
    differing = [f"{key} {there[key]} (the recipe's {name}: {here[key]})" for key in here if there[key] != here[key]]
    if differing:
        raise Refusal(f"{path / MODEL_FILE}: has {', '.join(differing)}; expected the model of the recipe")
    if folder.tokenizer.sha256 != Tokenizer(tokenizer).sha256:
        raise Refusal(f"{folder.tokenizer.path}: is not {tokenizer}; expected data that was prepared with this one")
    return folder


def fill_model(model: LlamaForCausalLM, folder: ModelFolder) -> None:
    """Copy every tensor into the model, which is not DeepSpeed's yet."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in folder.tensors():
            parameters[name].copy_(tensor)


def fill_masters(engine: "DeepSpeedEngine", folder: ModelFolder) -> None:
    """Give the fp32 masters the bits of the folder, which DeepSpeed has rounded to bf16. Without bf16 it has not."""
    from deepspeed.utils import safe_set_full_fp32_param

    if not engine.bfloat16_enabled():
        return
    if engine.zero_optimization():
        parameters = dict(engine.module.named_parameters())
        for name, tensor in folder.tensors():
            safe_set_full_fp32_param(parameters[name], tensor.float())
        return
    parts = stage_0_masters(engine)
    if len(parts) == 1:
        parts = list(parts[0].split([parameter.numel() for parameter in engine.module.parameters()]))
    for part, (_, tensor) in zip(parts, folder.tensors(), strict=True):
        part.data.copy_(tensor.float().reshape(part.shape))
