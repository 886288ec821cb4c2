"""Weights that a run starts from in place of random ones (`pretrain --init-from`): a model folder's or another run's.

They go in twice. Every rank fills its model with them before DeepSpeed divides it, tensor by tensor from mapped files,
which the ranks of a host share in memory: a rank holds no more than with random weights. Under bf16 DeepSpeed then
makes its fp32 masters from weights that are already rounded, so the masters are filled again, each rank its part.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinyllama_ds.checkpoint.description import tokenizer_sha256_of
from tinyllama_ds.checkpoint.format import (
    manifest_sha256,
    model_of,
    read_manifest,
    resolve_checkpoint,
    verify_checkpoint,
)
from tinyllama_ds.checkpoint.fragments import MASTER, local_fragments
from tinyllama_ds.checkpoint.reader import CheckpointReader
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import stored_tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf.model_folder import is_model_folder, open_model_folder, verify_model_folder
from tinyllama_ds.model.config import LlamaConfig, RopeScaling
from tinyllama_ds.model.llama import LlamaForCausalLM

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# May differ: weights have the same shapes at any context length and with any rotation, which a run can change by them.
_POSITIONS = ("rope_theta", "rope_scaling_factor", "rope_scaling", "max_position_embeddings")


@dataclass(frozen=True)
class InitialWeights:
    """A model folder, or a checkpoint of another run. Nothing of it is verified yet."""

    path: Path
    sha256: str  # of the weights; of a checkpoint's manifest, which has that of every file
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]  # one after another, as exact as they are stored
    verify: Callable[[], None]  # raises `ConfigError` where a file is damaged
    changes: str = ""  # of positions and their rotation, for the log

    def to_dict(self) -> dict:
        """What run.json remembers."""
        return {"path": str(self.path), "sha256": self.sha256}


def open_initial_weights(path: Path, model: LlamaConfig, tokenizer: Tokenizer) -> InitialWeights:
    """What a path means: a model folder, a checkpoint, or the newest checkpoint of a run.

    Raises `ConfigError` unless its shapes and its tokenizer are this run's. Positions and their rotation may differ.
    """
    if is_model_folder(path):
        folder = open_model_folder(path)
        found = InitialWeights(path, folder.weights_sha256, folder.tensors, lambda: verify_model_folder(folder))
        there, held = folder.model, folder.tokenizer
    elif path.is_dir():
        checkpoint = resolve_checkpoint(path)
        manifest = read_manifest(checkpoint)
        found = InitialWeights(
            checkpoint,
            manifest_sha256(checkpoint),
            lambda: CheckpointReader(checkpoint).weights(),
            lambda: _verify(checkpoint),
        )
        there, made_with = model_of(checkpoint, manifest.model), tokenizer_sha256_of(manifest.run)
        held = stored_tokenizer(checkpoint.parents[1], made_with, "this run")
    else:
        raise ConfigError(f"--init-from {path}: is not a directory; expected an imported model, a run or a checkpoint")
    for key, value in vars(model).items():
        if key not in _POSITIONS and getattr(there, key) != value:
            raise ConfigError(f"{found.path}: its model has {key} {getattr(there, key)}; the recipe's has {value}")
    if held.sha256 != tokenizer.sha256:
        raise ConfigError(
            f"{held.path}: is the tokenizer of the weights, and not {tokenizer.path}; prepare the data with it"
        )
    return replace(found, changes=_changes(there, model))


def _changes(there: LlamaConfig, now: LlamaConfig) -> str:
    pairs = ((key, getattr(there, key), getattr(now, key)) for key in _POSITIONS)
    return ", ".join(f"{key} {_shown(one)} -> {_shown(other)}" for key, one, other in pairs if one != other)


def _shown(value: float | RopeScaling | None) -> str:
    if value is None or isinstance(value, int | float):
        return "none" if value is None else f"{value:.12g}"
    return f"{value.rope_type} x{value.factor:.12g}"


def _verify(checkpoint: Path) -> None:
    verify_checkpoint(checkpoint)


def fill_model(model: LlamaForCausalLM, initial: InitialWeights) -> None:
    """Copy every tensor into a model that DeepSpeed does not have yet."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in initial.tensors():
            parameters[name].copy_(tensor)


def fill_masters(engine: "DeepSpeedEngine", initial: InitialWeights) -> None:
    """Give the fp32 masters the stored bits, which DeepSpeed has rounded to bf16. Without bf16 it has not."""
    if not engine.bfloat16_enabled():
        return
    fragments = defaultdict(list)
    for fragment in local_fragments(engine):
        fragments[fragment.name].append(fragment)
    for name, tensor in initial.tensors():
        for fragment in fragments[name]:
            fragment.fill({}, MASTER, tensor.flatten()[fragment.start : fragment.stop].float())
