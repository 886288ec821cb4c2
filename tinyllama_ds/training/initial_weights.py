"""The weights that a run starts from instead of random ones: another run's, with a fresh optimizer."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tinyllama_ds.data.tokenizer import TOKENIZER_FILE, Tokenizer
from tinyllama_ds.errors import Refusal
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import LlamaForCausalLM
from tinyllama_ds.training.checkpoint import MANIFEST_FILE, consolidated_weights, read_manifest, resolve_checkpoint


@dataclass(frozen=True)
class InitialWeights:
    """A checkpoint of another run."""

    checkpoint: Path

    def to_dict(self) -> dict:
        """What run.json remembers. The manifest has the SHA-256 of every file, so its own stands for all of them."""
        digest = hashlib.sha256((self.checkpoint / MANIFEST_FILE).read_bytes()).hexdigest()
        return {"path": str(self.checkpoint), "manifest_sha256": digest}


def open_initial_weights(path: Path, model: LlamaConfig, tokenizer: Path) -> InitialWeights:
    """The checkpoint that a path means; raises `Refusal` unless its shapes and vocabulary are this run's."""
    checkpoint = resolve_checkpoint(path)
    there = read_manifest(checkpoint).model
    for key, value in model.to_dict().items():
        if there.get(key) != value:
            raise Refusal(f"{checkpoint}: its model has {key} {there.get(key)}; the recipe's has {value}")
    held = checkpoint.parents[1] / TOKENIZER_FILE
    if Tokenizer(held).sha256 != Tokenizer(tokenizer).sha256:
        raise Refusal(f"{checkpoint}: was trained with {held}, which is not {tokenizer}; prepare the data with it")
    return InitialWeights(checkpoint)


def fill_model(model: LlamaForCausalLM, initial: InitialWeights) -> None:
    """Put the weights into a model that is not wrapped yet, bit for bit as training computed with them.

    Every file is verified first; raises `Refusal` where one is damaged.
    """
    _, weights = consolidated_weights(initial.checkpoint)
    model.load_state_dict(weights, strict=True)
