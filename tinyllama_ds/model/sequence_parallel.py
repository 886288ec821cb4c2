"""Sequence parallelism: ranks that share each sequence, each with its part of the tokens (Ulysses, Jacobs et al. 2023).

All of the decoder but attention works token by token. Around attention two all-to-alls exchange tokens for heads and
back, so that the attention function itself sees whole sequences, and the documents in them, with a part of the heads.

Shapes: B batch, T tokens of a sequence, N ranks that share it, H query heads, K key/value heads, E head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tinyllama_ds.model.attention import AttentionFunction


class SequenceParallel:
    """A group of N ranks that share each sequence: of its T tokens rank r has those from r * T / N on."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Without a group every rank has whole sequences."""
        self._group = group
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the ranks of a group all compute the same whole sequences, of any length."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def place_of(self, tokens: int) -> tuple[int, slice]:
        """Given the number of tokens that this rank has: T, and where in the sequence its tokens are."""
        if self._group is None or self._is_paused:
            return tokens, slice(0, tokens)
        first = self._group.rank() * tokens
        return self._group.size() * tokens, slice(first, first + tokens)

    def around(self, attend: AttentionFunction) -> AttentionFunction:
        """The attention of T / N tokens and all heads by that of T tokens and H / N query heads. Collective.

        Runs outside of compiled graphs, which end before the exchange and go on after it.
        """

        @torch.compiler.disable
        def attend_together(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
            if self._group is None or self._is_paused:
                return attend(q, k, v, documents)
            q, k, v = _scatter_heads(q, k, v, self._group)
            return _gather_heads(attend(q, k, v, documents), self._group)

        return attend_together


def _scatter_heads(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """From (B, T / N, H or K, E) to all tokens of this rank's share of the heads, in one all-to-all.

    A key head is sent to all ranks with query heads of its group: as often as makes the key heads divide over N.
    """
    N, K = group.size(), k.shape[2]
    copies = lcm(K, N) // K
    if copies > 1:
        k, v = (heads.repeat_interleave(copies, dim=2) for heads in (k, v))
    by_rank = [heads.unflatten(2, (N, -1)) for heads in (q, k, v)]  # (B, T / N, N, heads / N, E)
    parts = torch.cat(by_rank, dim=3).movedim(2, 0)
    received = _AllToAll.apply(parts, group)  # (N, B, T / N, heads / N, E): the tokens of each rank
    return received.transpose(0, 1).flatten(1, 2).split([heads.shape[3] for heads in by_rank], dim=2)


def _gather_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """From (B, T, H / N, E) to this rank's tokens of all heads (B, T / N, H, E)."""
    parts = x.unflatten(1, (group.size(), -1)).transpose(0, 1)  # (N, B, T / N, H / N, E)
    received = _AllToAll.apply(parts, group)  # (N, B, T / N, H / N, E): the heads of each rank
    return received.movedim(0, 2).flatten(2, 3)


class _AllToAll(torch.autograd.Function):
    """Part r of every rank's tensor (N, ...) goes to rank r, and its gradient takes the same way back."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(parts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, ctx.group), None


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received
