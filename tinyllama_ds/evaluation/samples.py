"""Samples from a model during training."""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def continue_greedily(
    logits_of: Callable[[Tensor], Tensor], prompts: list[list[int]], new_tokens: int, eos_id: int, device: torch.device
) -> list[list[int]]:
    """The most likely next ids of each prompt, up to the first EOS; `logits_of` is (P, T) -> (P, T, V).

    There are always `new_tokens` forwards on every rank: under ZeRO-3 each is collective. All prompts share a
    batch, padded on the right, which a causal model does not see.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    ids = torch.full((len(prompts), longest + new_tokens), eos_id, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    rows = torch.arange(len(prompts), device=device)
    for number in range(new_tokens):
        logits = logits_of(ids[:, : longest + number])
        ids[rows, lengths + number] = logits[rows, lengths + number - 1].argmax(dim=-1)
    ends = [len(prompt) + new_tokens for prompt in prompts]
    rows_of_prompts = zip(ids.tolist(), prompts, ends, strict=True)
    return [_document(row[len(prompt) : end], eos_id) for row, prompt, end in rows_of_prompts]


def _document(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
