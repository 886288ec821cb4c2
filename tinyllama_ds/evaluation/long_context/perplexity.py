"""Losses of long documents by position, and of the same tokens with less context.

A falling perplexity by position may come from the text, whose beginnings may be harder than what follows. The losses of
the same tokens with contexts of several lengths show what the context alone is worth.

Shapes: N tokens of a document, W tokens of a window, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.loss import token_losses

_FIRST_BUCKET = 32  # positions; later ones double


def reject_other_heads(model: Any) -> None:
    """Raises `ConfigError` unless logits are hidden states times the LM head, which `window_losses` computes chunk by
    chunk; other architectures scale or cap them.
    """
    ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        hidden = model.get_decoder()(input_ids=ids, use_cache=False)[0]
    if not torch.equal(logits, model.get_output_embeddings()(hidden)):
        raise ConfigError(
            f"{type(model).__name__}: its logits are more than hidden states times the LM head; expected a Llama"
        )


@torch.no_grad()
def window_losses(model: Any, ids: Tensor, window: int) -> Tensor:
    """The loss of every token of a document (N,) but the first, (N - 1,) in fp32, seen through windows of W tokens.

    Windows begin every W / 2 tokens, and each scores the tokens that those before it did not: all of the first, half
    of the others. So a token has at least W / 2 tokens of context, or all from the start of the document. Logits of
    the document never exist as a whole.
    """
    total = len(ids)
    width = min(window, total)
    starts = [*range(0, total - width, max(1, width // 2)), total - width]
    losses = torch.empty(total - 1, device=ids.device)
    done = 0  # losses so far
    together = max(1, total // width)  # no more tokens than the document has
    for first in range(0, len(starts), together):
        of_batch = starts[first : first + together]
        rows = torch.stack([ids[start : start + width] for start in of_batch])
        hidden = model.get_decoder()(input_ids=rows, use_cache=False)[0][:, :-1]  # (B, W - 1, D)
        weight = model.get_output_embeddings().weight
        found = token_losses(hidden.flatten(0, 1), weight, rows[:, 1:].flatten()).view(len(rows), -1)
        for start, row in zip(of_batch, found, strict=True):
            losses[done : start + width - 1] = row[done - start :]
            done = start + width - 1
    return losses


def position_buckets(length: int) -> list[tuple[int, int]]:
    """Positions [first, end) of tokens with a loss, 1 to `length` - 1, in buckets that double from 32 on."""
    edges = [1, *(2**power for power in range(_FIRST_BUCKET.bit_length() - 1, length.bit_length())), length]
    edges = sorted({edge for edge in edges if edge <= length})
    return list(zip(edges, edges[1:], strict=False))


def bucket_means(losses: np.ndarray, length: int) -> list[float]:
    """The mean of the losses (N - 1,) of a document in each bucket of its positions up to `length`."""
    return [float(losses[first - 1 : end - 1].mean(dtype=np.float64)) for first, end in position_buckets(length)]


def second_half_mean(losses: np.ndarray) -> float:
    """The mean of the losses (N - 1,) of the second half of a document."""
    return float(losses[len(losses) // 2 :].mean(dtype=np.float64))


def by_position(means: np.ndarray, length: int) -> list[dict[str, Any]]:
    """Mean loss and standard error of each bucket of positions, of `bucket_means` (documents, buckets)."""
    return [
        {"first": first, "end": end, "tokens": (end - first) * len(column)} | _mean_of_documents(column)
        for (first, end), column in zip(position_buckets(length), means.T, strict=True)
    ]


def by_context(means: np.ndarray, lengths: Sequence[int], document_tokens: int) -> list[dict[str, Any]]:
    """Mean loss of the second halves of the documents for each length of context, of `second_half_mean` (documents,
    lengths), and its difference from that of the first length, document by document.
    """
    tokens = (document_tokens - 1 - (document_tokens - 1) // 2) * len(means)
    return [
        {"context": length, "tokens": tokens}
        | _mean_of_documents(column)
        | {"difference": _mean_of_documents(column - means[:, 0])}
        for length, column in zip(lengths, means.T, strict=True)
    ]


def _mean_of_documents(means: np.ndarray) -> dict[str, float | None]:
    """The mean over documents, and its standard error: the tokens of a document are not independent."""
    error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
    return {"value": float(means.mean()), "stderr": error}
