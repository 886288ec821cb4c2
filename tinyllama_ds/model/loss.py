"""LM head and loss in one module, chunk by chunk, so that fp32 logits of the whole batch never exist.

Shapes: N rows (B times T), D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyllama_ds.model.config import MAX_CHUNK_LOGITS

IGNORE_INDEX = -100  # the label of positions without a target, as in PyTorch
# logits of a chunk (C, V), labels (C,), the number of targets, and what else belongs to each row, to its part in the
# mean loss and the gradient by the logits
OfChunk = Callable[..., tuple[Tensor, Tensor]]


class LMHeadLoss(nn.Module):
    """Owns the output projection and turns hidden states into a loss inside its own `forward`.

    ZeRO-3 gathers a parameter for the module that owns it; a loss that used `lm_head.weight` from outside would get a
    partitioned one.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.loss_and_grad: OfChunk = loss_and_grad  # or its compiled form
        self.distillation_and_grad: OfChunk | None = None  # of a student (`distillation.py`), or its compiled form

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        teacher: tuple[Tensor, Tensor] | None = None,
        reduction: str = "mean",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V) without labels; with labels (B, T), the mean cross-entropy over all targets, a fp32 scalar,
        or with the reduction "none" that of each target (B, T), without a gradient.

        Rows labelled `IGNORE_INDEX` have no target. Without any target the loss is 0.

        With the ids (B, T, k) and log-probabilities (B, T, k + 1) of a teacher, the loss of a student, and without a
        gradient [cross-entropy, divergence from the teacher].
        """
        if labels is None:
            return hidden @ self.weight.t()
        rows = hidden.flatten(0, -2)  # (N, D)
        if reduction == "none":
            return token_losses(rows, self.weight, labels.flatten()).view_as(labels)
        if teacher is None:
            return chunked_cross_entropy(rows, self.weight, labels.flatten(), of_chunk=self.loss_and_grad)
        assert self.distillation_and_grad is not None
        of_rows = labels.flatten(), *(tensor.flatten(0, -2) for tensor in teacher)
        losses = chunked_loss(rows, self.weight, of_rows, self.distillation_and_grad)
        return losses[0], losses[1:].detach()


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


@torch.no_grad()
def token_losses(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each row of `rows @ weight.T` (N, V), a fp32 tensor (N,); 0 without a target."""
    losses = []
    for some, targets in zip(*(tensor.split(_chunk_rows(weight)) for tensor in (rows, labels)), strict=True):
        log_probs = torch.log_softmax(some @ weight.t(), dim=-1, dtype=torch.float32)
        losses.append(F.nll_loss(log_probs, targets, ignore_index=IGNORE_INDEX, reduction="none"))
    return torch.cat(losses)


def _chunk_rows(weight: Tensor) -> int:
    return max(1, MAX_CHUNK_LOGITS[weight.device.type] // weight.shape[0])


def chunked_cross_entropy(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_rows: int | None = None,
    of_chunk: OfChunk = loss_and_grad,
) -> Tensor:
    """Mean cross-entropy of `rows @ weight.T` (N, V) against `labels` (N,), with one chunk of logits alive at a time.

    The softmax is in fp32 and the gradient of the weight is summed over chunks in fp32. `chunk_rows` defaults to what
    fits `MAX_CHUNK_LOGITS`. Under `no_grad` no gradient is computed.
    """
    return chunked_loss(rows, weight, (labels,), of_chunk, chunk_rows)


def chunked_loss(
    rows: Tensor, weight: Tensor, of_rows: Sequence[Tensor], of_chunk: OfChunk, chunk_rows: int | None = None
) -> Tensor:
    """The same with any loss. `of_rows` are tensors (N, ...) that are cut into chunks with the rows; the labels are
    first. Where `of_chunk` gives several losses, the gradient is that of the first, and the others have none.
    """
    if chunk_rows is None:
        chunk_rows = _chunk_rows(weight)
    chunks = [slice(start, start + chunk_rows) for start in range(0, rows.shape[0], chunk_rows)]
    if torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad):
        return _ChunkedLoss.apply(rows, weight, of_rows, chunks, of_chunk)
    num_targets = _count_targets(of_rows[0])
    total = torch.zeros((), dtype=torch.float32, device=rows.device)
    for chunk in chunks:
        labels, *more = (tensor[chunk] for tensor in of_rows)
        total = total + of_chunk(rows[chunk] @ weight.t(), labels, num_targets, *more)[0]
    return total


def _count_targets(labels: Tensor) -> Tensor:
    return (labels != IGNORE_INDEX).sum().clamp(min=1)


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are computed in the forward pass, while a chunk's logits are at hand, and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, of_rows: Sequence[Tensor], chunks: Sequence[slice], of_chunk: OfChunk
    ) -> Tensor:
        num_targets = _count_targets(of_rows[0])
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        for chunk in chunks:
            labels, *more = (tensor[chunk] for tensor in of_rows)
            losses, grad_logits = of_chunk(rows[chunk] @ weight.t(), labels, num_targets, *more)
            total = total + losses
            torch.mm(grad_logits, weight, out=grad_rows[chunk])
            grad_weight += grad_logits.t() @ rows[chunk]
        ctx.save_for_backward(grad_rows, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_rows, grad_weight = ctx.saved_tensors
        grad_loss = grad_losses.flatten()[0]
        return grad_rows * grad_loss, grad_weight * grad_loss, None, None, None
