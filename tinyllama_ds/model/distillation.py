"""Distillation: a student learns the distribution of a teacher, of which the k most probable tokens are known.

At each position P is the teacher's distribution over k + 1 buckets: its k most probable tokens, and the rest, all other
tokens together. Q is the student's over the same buckets. At the temperature S both are flattened,
P_S,i = P_i^(1/S) / sum_j P_j^(1/S), and the loss is

    (1 - w) * cross-entropy + w * S^2 * KL(P_S || Q_S)

(Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network": S^2 keeps the size of the gradient).
With all tokens in P this is their loss. The rest as one bucket teaches how much probability all other tokens have
together, and not which: at S = 1 the divergence is a lower bound of that over the whole vocabulary.

Shapes: C rows of a chunk, k tokens kept, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinyllama_ds.model.loss import IGNORE_INDEX, OfChunk

_LEAST_LOG_PROB = -60_000.0  # instead of -inf: the largest numbers of fp16 are 65,504
_LEAST_PROB = 1e-30  # of a student's rest, which is divided by


def top_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A teacher's k most probable tokens (C, k), and the log-probabilities of these and of the rest (C, k + 1) in fp32,
    from its logits (C, V).
    """
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    top, ids = log_probs.topk(k)
    rest = log_probs.scatter_(1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return ids, torch.cat((top, rest), dim=1).clamp_(min=_LEAST_LOG_PROB)


def distillation_of(weight: float, temperature: float) -> OfChunk:
    """`LMHeadLoss.distillation_and_grad` with the weight w of the divergence, from 0 to 1, and the temperature S."""

    def of_chunk(logits: Tensor, labels: Tensor, num_targets: Tensor, *teacher: Tensor) -> tuple[Tensor, Tensor]:
        return distillation_and_grad(logits, labels, num_targets, teacher, weight, temperature)

    return of_chunk


def distillation_and_grad(
    logits: Tensor, labels: Tensor, num_targets: Tensor, predicted: Sequence[Tensor], weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """The part of a chunk of logits (C, V) in the mean loss, as [loss, cross-entropy, divergence], and the gradient of
    the loss by the logits.

    The teacher predicted ids (C, k) with log-probabilities (C, k + 1), rounded: they are normalised here. All is
    computed in fp32; the gradient is returned in the logits' dtype. With q the student's probability of a token,

        d KL(P_S || Q_S) / d logit = (Q_S,i - P_S,i) / S for the token kept as i, and for a token of the rest
                                     (Q_S,rest - P_S,rest) / S * q / Q_rest
    """
    loss_mask = labels != IGNORE_INDEX  # (C,)
    targets, ids = labels.clamp(min=0)[:, None], predicted[0].long()  # (C, 1), (C, k)
    scale = loss_mask / num_targets
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    cross_entropy = -(log_probs.gather(1, targets)[:, 0] * scale).sum()
    top = log_probs.gather(1, ids)
    grad = log_probs.exp_()  # q
    # Summed up without the tokens kept, and not as 1 - their sum: that has no digits left where the student is certain.
    rest = grad.scatter_(1, ids, 0.0).sum(dim=1, keepdim=True).clamp(min=_LEAST_PROB)
    student = torch.log_softmax(torch.cat((top, rest.log()), dim=1) / temperature, dim=1)  # log Q_S
    teacher = torch.log_softmax(predicted[1].float() / temperature, dim=1)  # log P_S
    divergence = ((teacher.exp() * (teacher - student)).sum(dim=1) * scale).sum()
    slope = weight * temperature * (student.exp() - teacher.exp())  # (C, k + 1)
    grad.mul_((1 - weight) + slope[:, -1:] / rest)
    grad.scatter_(1, ids, (1 - weight) * top.exp() + slope[:, :-1])
    grad.scatter_add_(1, targets, grad.new_full(targets.shape, weight - 1))
    loss = (1 - weight) * cross_entropy + weight * temperature**2 * divergence
    return torch.stack((loss, cross_entropy, divergence)), grad.mul_(scale[:, None]).to(logits.dtype)
