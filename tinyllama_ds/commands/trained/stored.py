"""A model by the path that a command is given."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from tinyllama_ds.data.tokenizers.abstract import Tokenizer
    from tinyllama_ds.model.config import LlamaConfig
    from tinyllama_ds.model.probe import Probe


@dataclass(frozen=True)
class ModelSource:
    """A model as it lies on the disk; its tensors come one after another."""

    name: str  # of the recipe or the folder
    tensors: "Iterator[tuple[str, Tensor]]"
    config: "LlamaConfig"
    tokenizer: "Tokenizer"
    probe: "Probe | None" = None
    is_chat_model: bool = False
    tokens: int | None = None  # that a checkpoint was trained on; of an imported model it is not known


def open_stored(path: Path, average: int = 1) -> ModelSource:
    """The model of a checkpoint, a run directory or a model folder, every file verified; one of muP as a plain Llama.

    `average` is the number of checkpoints of the run, up to this one, whose mean it is.
    """
    from tinyllama_ds.checkpoint.description import tokenizer_sha256_of
    from tinyllama_ds.checkpoint.format import last_checkpoints, model_of
    from tinyllama_ds.checkpoint.reader import stream_average, stream_weights
    from tinyllama_ds.data.tokenizers.storage import stored_tokenizer
    from tinyllama_ds.hf.model_folder import is_model_folder, open_model_folder, verify_model_folder
    from tinyllama_ds.model.llama import fold_multipliers
    from tinyllama_ds.run.resolve import is_chat_run

    if is_model_folder(path):
        if average > 1:
            raise ConfigError(f"{path}: is a model folder; expected a run directory or a checkpoint for --average")
        folder = open_model_folder(path)
        verify_model_folder(folder)
        return ModelSource(path.resolve().name, folder.tensors(), folder.model, folder.tokenizer)
    *before, checkpoint = last_checkpoints(path, average)
    manifest, tensors = stream_average([*before, checkpoint]) if before else stream_weights(checkpoint)
    config, tensors = fold_multipliers(model_of(checkpoint, manifest.model), tensors)
    tokenizer = stored_tokenizer(checkpoint.parents[1], tokenizer_sha256_of(manifest.run), "this run")
    return ModelSource(
        manifest.run["recipe"]["name"],
        tensors,
        config,
        tokenizer,
        probe=None if before else manifest.health.probe,  # which is the loss of one checkpoint's weights
        is_chat_model=is_chat_run(manifest.run),
        tokens=manifest.progress.tokens,
    )
