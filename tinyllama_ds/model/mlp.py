"""SwiGLU, in recomputed blocks chunk by chunk, so that a whole tensor of the intermediate size never exists.

Shapes: B batch, T tokens, N rows (B times T), C rows of a chunk, D hidden size, F intermediate size.
"""

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyllama_ds.model.config import MLP_CHUNK_TOKENS, LlamaConfig

Weights = tuple[Tensor, Tensor, Tensor]  # gate (F, D), up (F, D), down (D, F)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) (Shazeer 2020) of rows (C, D)."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def swiglu_gradients(
    x: Tensor, grad: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients by x and by the weights, given that by the output (C, D): two products are made again."""
    gated, lifted = F.linear(x, gate), F.linear(x, up)  # (C, F)
    active = F.silu(gated)
    grad_hidden = grad @ down
    grad_gated = torch.ops.aten.silu_backward(grad_hidden * lifted, gated)
    grad_lifted = grad_hidden * active
    grad_x = grad_gated @ gate + grad_lifted @ up
    return grad_x, grad_gated.t() @ x, grad_lifted.t() @ x, grad.t() @ (active * lifted)


class SwiGLU(nn.Module):
    """The MLP of a block. With `is_chunked` that of sequences of more than two chunks (`MLP_CHUNK_TOKENS`) is computed
    chunk by chunk, and again in the backward pass.
    """

    def __init__(self, config: LlamaConfig, is_chunked: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.is_chunked = is_chunked
        self.of_chunk: Callable[..., Tensor] = swiglu  # or its compiled form
        self.gradients_of_chunk: Callable[..., tuple[Tensor, ...]] = swiglu_gradients  # or its compiled form

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        if self.is_chunked and x.shape[-2] > 2 * MLP_CHUNK_TOKENS:
            return self.in_chunks(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def in_chunks(self, x: Tensor) -> Tensor:
        """The same; kept out of compiled graphs (`train/compile.py`)."""
        rows, weights = x.flatten(0, -2), (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        chunks = ceil(len(rows) / MLP_CHUNK_TOKENS)
        # Before the products: a recomputed block needs no more than what is kept here, and stops.
        gradient = _ChunkedGradient.apply(rows, chunks, self.gradients_of_chunk, *weights)
        out = torch.empty_like(rows)
        with torch.no_grad():
            for chunk, into in zip(rows.chunk(chunks), out.chunk(chunks), strict=True):
                into.copy_(self.of_chunk(chunk, *weights))
        return out.add_(gradient).view_as(x)


class _ChunkedGradient(torch.autograd.Function):
    """Adds 0 to the output, and has the gradients of the MLP.

    Those of the weights are summed over chunks in fp32, and rounded once, as a product over all rows does it.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, chunks: int, gradients_of_chunk: Callable[..., tuple[Tensor, ...]], *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, *weights)
        ctx.chunks, ctx.gradients_of_chunk = chunks, gradients_of_chunk
        return rows.new_zeros(()).expand_as(rows)  # one element in memory

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        grad_rows = torch.empty_like(rows)
        grad_weights = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        for chunk, grad_out, into in zip(*(t.chunk(ctx.chunks) for t in (rows, grad, grad_rows)), strict=True):
            grad_chunk, *of_weights = ctx.gradients_of_chunk(chunk, grad_out, *weights)
            into.copy_(grad_chunk)
            for total, part in zip(grad_weights, of_weights, strict=True):
                total += part
        return grad_rows, None, None, *(total.to(rows.dtype) for total in grad_weights)
