"""Causal attention for CPUs: query blocks against their past keys, as matrix products in the model's dtype.

PyTorch's CPU flash kernel leaves most of the matrix unit idle. Here a block of queries of all heads that share a key
head is one matrix product with all earlier keys: half of the score matrix is never computed, and the rest runs at the
rate of the hardware, in a third of the time at 512 tokens (docs/performance.md).

Shapes: B batch, T tokens, H query heads, K key/value heads, G = H / K, E head size, N = B * K, q a block, S keys.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # queries; measured best of 16 to 128 from 128 to 2,048 tokens


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """q is (B, T, H, E); k and v are (B, T, K, E); the result is (B, T, H, E).

    With `document_ids` (B, T), the number of the document of each token, a token sees its own document only.
    """
    return _BlockedAttention.apply(q, k, v, document_ids)


class _BlockedAttention(torch.autograd.Function):
    """Scores are rounded to the model's dtype once; softmax and its gradient are in fp32. The equations are those of
    FlashAttention-2 (Dao 2023, section 3.1), with probabilities kept for the backward pass instead of recomputed.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None) -> Tensor:
        B, T, H, E = q.shape
        K = k.shape[2]
        G = H // K
        queries = _queries_by_key_head(q * E**-0.5, K)  # (N, T * G, E)
        keys, values = _by_head(k), _by_head(v)  # (N, T, E)
        out = torch.empty_like(queries)
        kept = []
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            rows = slice(start * G, end * G)
            scores = torch.bmm(queries[:, rows], keys[:, :end].transpose(1, 2)).float()  # (N, q * G, S)
            scores[:, :, start:].masked_fill_(_future(end - start, G, q.device), float("-inf"))
            if document_ids is not None:
                scores.masked_fill_(_other_documents(document_ids, start, end, K, G), float("-inf"))
            probabilities = scores.softmax(dim=-1).to(q.dtype)
            out[:, rows] = torch.bmm(probabilities, values[:, :end])
            kept.append(probabilities)
        ctx.save_for_backward(queries, keys, values, out, *kept)
        return _queries_by_token(out, B, K, G)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, out, *kept = ctx.saved_tensors
        B, T, H, E = grad.shape
        K = keys.shape[0] // B
        G = H // K
        grad_out = _queries_by_key_head(grad, K)  # (N, T * G, E)
        delta = (grad_out.float() * out.float()).sum(dim=-1, keepdim=True)  # (N, T * G, 1)
        grad_queries = torch.empty_like(queries)
        of_keys, of_values = [], []  # of every query block, (N, S, E)
        for probabilities, start in zip(kept, range(0, T, BLOCK), strict=True):
            end = min(start + BLOCK, T)
            rows = slice(start * G, end * G)
            of_values.append(torch.bmm(probabilities.transpose(1, 2), grad_out[:, rows]))
            grad_scores = torch.bmm(grad_out[:, rows], values[:, :end].transpose(1, 2)).float()
            grad_scores = grad_scores.sub_(delta[:, rows]).mul_(probabilities).to(grad.dtype)  # (N, q * G, S)
            grad_queries[:, rows] = torch.bmm(grad_scores, keys[:, :end])
            of_keys.append(torch.bmm(grad_scores.transpose(1, 2), queries[:, rows]))
        grad_k, grad_v = (_from_head(_sum_over_queries(parts), B) for parts in (of_keys, of_values))
        return _queries_by_token(grad_queries * E**-0.5, B, K, G), grad_k, grad_v, None


def _sum_over_queries(parts: list[Tensor]) -> Tensor:
    """The gradients that each query block gives to the keys it sees, (N, S, E), to their sum (N, T, E), in fp32.

    Key block by key block, because sums over growing slices of one tensor compile to masked loads of all of it.
    """
    totals = []
    for number, part in enumerate(parts):
        own = slice(number * BLOCK, part.shape[1])
        total = part[:, own].float()
        for later in parts[number + 1 :]:
            total += later[:, own]
        totals.append(total.to(part.dtype))
    return torch.cat(totals, dim=1)


def _future(block: int, groups: int, device: torch.device) -> Tensor:
    """The future keys within the block of each query row: (q * G, q)."""
    token = torch.arange(block, device=device)
    return token > token.repeat_interleave(groups)[:, None]


def _other_documents(document_ids: Tensor, start: int, end: int, K: int, G: int) -> Tensor:
    """The keys of documents other than the query row's: (N, q * G, S)."""
    other = document_ids[:, start:end, None] != document_ids[:, None, :end]  # (B, q, S)
    return other.repeat_interleave(K, dim=0).repeat_interleave(G, dim=1)


def _by_head(x: Tensor) -> Tensor:
    """(B, T, K, E) to (N, T, E)."""
    B, T, K, E = x.shape
    return x.transpose(1, 2).reshape(B * K, T, E)


def _from_head(x: Tensor, B: int) -> Tensor:
    """(N, T, E) to (B, T, K, E)."""
    N, T, E = x.shape
    return x.view(B, N // B, T, E).transpose(1, 2)


def _queries_by_key_head(q: Tensor, K: int) -> Tensor:
    """(B, T, H, E) to (N, T * G, E): the queries that share a key head become rows of one matrix, token by token."""
    B, T, H, E = q.shape
    return q.reshape(B, T, K, H // K, E).transpose(1, 2).reshape(B * K, T * H // K, E)


def _queries_by_token(rows: Tensor, B: int, K: int, G: int) -> Tensor:
    """(N, T * G, E) back to (B, T, H, E)."""
    _, length, E = rows.shape
    return rows.view(B, K, length // G, G, E).transpose(1, 2).reshape(B, length // G, K * G, E)
