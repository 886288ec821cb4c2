"""LM head and cross-entropy in one module, chunk by chunk, so that fp32 logits of the whole batch never exist.

Shapes: N rows (B times T), D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinyllama_ds.model.config import MAX_CHUNK_LOGITS

IGNORE_INDEX = -100  # the label of positions without a target, as in PyTorch


class LMHeadLoss(nn.Module):
    """Owns the output projection and turns hidden states into a loss inside its own `forward`.

    ZeRO-3 gathers a parameter for the module that owns it; a loss that used `lm_head.weight` from outside would get a
    partitioned one.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.loss_and_grad = loss_and_grad  # or its compiled form

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) without labels; with labels (B, T), the mean cross-entropy over all targets, a fp32 scalar.

        Rows labelled `IGNORE_INDEX` have no target. Without any target the loss is 0.
        """
        if labels is None:
            return hidden @ self.weight.t()
        rows = hidden.flatten(0, -2)  # (N, D)
        return chunked_cross_entropy(rows, self.weight, labels.flatten(), of_chunk=self.loss_and_grad)


def loss_and_grad(logits: Tensor, labels: Tensor, num_targets: Tensor) -> tuple[Tensor, Tensor]:
    """The part of a chunk of logits (C, V) in the mean loss, and d(mean loss)/d(logits), (softmax - onehot) / targets.

    Both are computed in fp32; the gradient is returned in the logits' dtype.
    """
    loss_mask = labels != IGNORE_INDEX  # (C,)
    targets = labels.clamp(min=0)[:, None]  # (C, 1)
    scale = loss_mask / num_targets
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = -(log_probs.gather(1, targets)[:, 0] * scale).sum()
    grad = log_probs.exp_()
    grad.scatter_add_(1, targets, grad.new_full(targets.shape, -1.0))
    return loss, grad.mul_(scale[:, None]).to(logits.dtype)


def chunked_cross_entropy(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_rows: int | None = None,
    of_chunk: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = loss_and_grad,
) -> Tensor:
    """Mean cross-entropy of `rows @ weight.T` (N, V) against `labels` (N,), with one chunk of logits alive at a time.

    The softmax is in fp32 and the gradient of the weight is summed over chunks in fp32. `chunk_rows` defaults to what
    fits `MAX_CHUNK_LOGITS`. Under `no_grad` no gradient is computed.
    """
    if chunk_rows is None:
        chunk_rows = max(1, MAX_CHUNK_LOGITS[rows.device.type] // weight.shape[0])
    chunks = [slice(start, start + chunk_rows) for start in range(0, rows.shape[0], chunk_rows)]
    if torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad):
        return _ChunkedCrossEntropy.apply(rows, weight, labels, chunks, of_chunk)
    num_targets = _count_targets(labels)
    total = torch.zeros((), dtype=torch.float32, device=rows.device)
    for chunk in chunks:
        total += of_chunk(rows[chunk] @ weight.t(), labels[chunk], num_targets)[0]
    return total


def _count_targets(labels: Tensor) -> Tensor:
    return (labels != IGNORE_INDEX).sum().clamp(min=1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are computed in the forward pass, while a chunk's logits are at hand, and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, chunks: Sequence[slice], of_chunk: Callable
    ) -> Tensor:
        num_targets = _count_targets(labels)
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        for chunk in chunks:
            loss, grad_logits = of_chunk(rows[chunk] @ weight.t(), labels[chunk], num_targets)
            total += loss
            torch.mm(grad_logits, weight, out=grad_rows[chunk])
            grad_weight += grad_logits.t() @ rows[chunk]
        ctx.save_for_backward(grad_rows, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_rows, grad_weight = ctx.saved_tensors
        return grad_rows * grad_loss, grad_weight * grad_loss, None, None, None
