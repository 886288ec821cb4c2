"""Fine-tuning on conversations without packs, masks, DeepSpeed or our loop: each conversation alone, in plain PyTorch.

usage: plain_chat_loop.py RECIPE DATA STEPS, prints a JSON object with the loss and gradient norm of every step.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from plain_loop import open_samples, train

from tinyllama_ds.config.recipe import load_recipe
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.data.tokenizers.train_tokenizer import EOS_ID
from tinyllama_ds.model.llama import LlamaForCausalLM, build_model


def answer_loss(model: LlamaForCausalLM, ids: list[int], header: list[int]) -> tuple[torch.Tensor, int]:
    """Sum of the losses of a conversation's answers, each with its EOS, and how many tokens that are."""
    log_probs = model(torch.tensor([ids]))[0].log_softmax(dim=-1)
    ends = [number + 1 for number, token in enumerate(ids) if token == EOS_ID]
    targets = [
        number
        for start, end in zip([0, *ends], ends, strict=False)
        if ids[start : start + len(header)] == header
        for number in range(start + len(header), end)
    ]
    return -sum(log_probs[number - 1, ids[number]] for number in targets), len(targets)


def main(recipe_path: str, data: str, steps: int) -> None:
    recipe = load_recipe(recipe_path)
    streams, order, batch = open_samples(recipe, data, steps)
    header = load_tokenizer(Path(data)).encode("\n<|assistant|>\n")
    model = build_model(recipe.model, "eager", recipe.seed)

    def loss_of(step: int) -> torch.Tensor:
        located = order.locate(np.arange(step * batch, (step + 1) * batch))
        packs = [streams["chat"].documents(one, recipe.sequence_length) for one in located.sample.tolist()]
        parts = [answer_loss(model, conversation.tolist(), header) for pack in packs for conversation in pack]
        return sum(part for part, _ in parts) / sum(count for _, count in parts)

    train(model, loss_of, steps)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
