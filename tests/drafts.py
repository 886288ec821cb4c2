"""Small models with random weights, as targets and drafts of speculative decoding."""

from dataclasses import replace
from typing import Any

import torch

from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.hf.generate import Sampling, load_from_weights
from tinyllama_ds.model.config import MODEL_SIZES
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.speculative.pair import NamedModel

SHAPE = MODEL_SIZES["test"]
GREEDY = Sampling(12, 0.0, 1.0, 0)


def model(tokenizer: Tokenizer, seed: int, name: str = "model", **changes: Any) -> NamedModel:
    """Of weights so large that what it chooses depends on what it reads; `changes` are of its shape."""
    shape = replace(SHAPE, **changes)
    weights = {key: 3 * tensor for key, tensor in build_model(shape, "eager", seed=seed).state_dict().items()}
    return NamedModel(name, load_from_weights(weights, shape, tokenizer))


def perturbed(named: NamedModel, scale: float) -> NamedModel:
    """The same model after noise of so many standard deviations, which it then agrees with now and then."""
    generator = torch.Generator().manual_seed(3)
    for parameter in named.loaded.model.parameters():
        if parameter.dim() == 2:
            parameter.data += scale * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    return named
