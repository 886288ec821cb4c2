"""Distillation without a cache, chunks, DeepSpeed or our loop: transformers' teacher predicts each batch when needed.

usage: plain_distillation_loop.py RECIPE DATA STEPS TEACHER K, prints a JSON object with the series of every step.
"""

import json
import sys

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from plain_loop import open_samples, train
from torch import Tensor

from tinyllama_ds.config.recipe import load_recipe
from tinyllama_ds.data.loader import SampleReader
from tinyllama_ds.model.llama import build_model


def buckets(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of some tokens and of all others together."""
    probs = logits.double().softmax(dim=-1)
    others = probs.scatter(-1, ids, 0.0).sum(dim=-1, keepdim=True)
    return torch.cat((probs.gather(-1, ids), others), dim=-1).log()


def main(recipe_path: str, data: str, steps: int, teacher_folder: str, k: int) -> None:
    recipe = load_recipe(recipe_path)
    assert recipe.teacher is not None
    weight, temperature = recipe.teacher.weight, recipe.teacher.temperature
    streams, order, batch = open_samples(recipe, data, steps)
    reader = SampleReader(streams, order, recipe.sequence_length, recipe.model.vocab_size)
    student = build_model(recipe.model, "eager", recipe.seed)
    teacher = transformers.LlamaForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    series: dict[str, list[float]] = {"cross_entropy": [], "divergence": []}

    def loss_of(step: int) -> Tensor:
        tokens = torch.from_numpy(reader.read(np.arange(step * batch, (step + 1) * batch)))
        logits = student(tokens[:, :-1]).flatten(0, 1)
        with torch.no_grad():
            predicted = teacher(tokens[:, :-1]).logits.flatten(0, 1)
        ids = predicted.topk(k).indices
        mine, theirs = (F.log_softmax(buckets(each, ids) / temperature, dim=-1) for each in (logits, predicted))
        cross_entropy = F.cross_entropy(logits, tokens[:, 1:].flatten())
        divergence = F.kl_div(mine, theirs, reduction="batchmean", log_target=True)
        series["cross_entropy"].append(cross_entropy.item())
        series["divergence"].append(divergence.item())
        return (1 - weight) * cross_entropy + weight * temperature**2 * divergence

    train(student, loss_of, steps)
    print(json.dumps(series))


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
