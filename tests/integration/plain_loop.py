"""The same training without DeepSpeed, launcher or our loop: one process, torch's AdamW, the published schedule.

usage: plain_loop.py RECIPE DATA STEPS [grouped | mup], prints a JSON object with the loss and gradient norm of every
step; "grouped" has parameter groups, "mup" those of a model twice as wide as the base of its recipe.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tinyllama_ds.config.recipe import Recipe, load_recipe
from tinyllama_ds.data.loader import SampleReader, open_streams
from tinyllama_ds.data.order import MixtureStage, SampleOrder
from tinyllama_ds.data.stream import TokenStream
from tinyllama_ds.model.llama import LlamaForCausalLM, build_model

PEAK, WARMUP, FLOOR = 3e-3, 5, 0.1


def learning_rate(step: int, total: int) -> float:
    """TinyLlama's get_lr, with the step counted once it is complete."""
    it = step + 1
    if it < WARMUP:
        return PEAK * it / WARMUP
    progress = (it - WARMUP) / (total - WARMUP)
    return PEAK * FLOOR + 0.5 * (1 + math.cos(math.pi * progress)) * (PEAK - PEAK * FLOOR)


def open_samples(recipe: Recipe, data: str, steps: int) -> tuple[dict[str, TokenStream], SampleOrder, int]:
    """The sources, the order of their samples, and how many are in a step."""
    T = recipe.sequence_length
    batch = recipe.stages[0].global_batch_tokens // T
    streams = open_streams(Path(data), recipe.sources, "train", recipe.model.vocab_size)
    sizes = {name: stream.num_samples(T) for name, stream in streams.items()}
    return streams, SampleOrder(recipe.seed, sizes, [MixtureStage(steps * batch, recipe.stages[0].weights)]), batch


def grouped(model: LlamaForCausalLM) -> list[dict]:
    """PyTorch's groups: norms without weight decay, embeddings as well and faster, queries and keys slower."""
    decoder = model.model
    attentions = [layer.self_attn for layer in decoder.layers]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    slow = [projection.weight for attention in attentions for projection in (attention.q_proj, attention.k_proj)]
    chosen = {id(parameter) for parameter in (*norms, decoder.embed_tokens.weight, *slow)}
    return [
        {"params": norms, "weight_decay": 0.0},
        {"params": [decoder.embed_tokens.weight], "weight_decay": 0.0, "multiplier": 3.0},
        {"params": slow, "multiplier": 0.5},
        {"params": [parameter for parameter in model.parameters() if id(parameter) not in chosen]},
    ]


def of_mup(model: LlamaForCausalLM) -> list[dict]:
    """PyTorch's groups of a model twice as wide as its base: the blocks' matrices, and all else."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2]
    chosen = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [{"params": matrices, "weight_decay": 0.2, "multiplier": 0.5}, {"params": others}]


KINDS = {"": lambda model: None, "grouped": grouped, "mup": of_mup}


def train(
    model: LlamaForCausalLM, loss_of: Callable[[int], torch.Tensor], steps: int, groups: list[dict] | None = None
) -> None:
    """Train on the loss of each step's batch, and print all losses and gradient norms."""
    parameters = groups or model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=PEAK, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses, norms = [], []
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps) * group.get("multiplier", 1.0)
        optimizer.step()
        losses.append(loss.item())
    print(json.dumps({"loss": losses, "grad_norm": norms}))


def main(recipe_path: str, data: str, steps: int, kind: str = "") -> None:
    recipe = load_recipe(recipe_path)
    config = recipe.model
    streams, order, batch = open_samples(recipe, data, steps)
    reader = SampleReader(streams, order, recipe.sequence_length, config.vocab_size)
    model = build_model(config, "eager", recipe.seed)

    def loss_of(step: int) -> torch.Tensor:
        tokens = torch.from_numpy(reader.read(np.arange(step * batch, (step + 1) * batch)))
        logits = model(tokens[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    train(model, loss_of, steps, KINDS[kind](model))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
