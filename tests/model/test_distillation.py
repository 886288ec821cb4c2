"""The loss of a student against PyTorch's own divergence on whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyllama_ds.model.distillation import distillation_of, top_log_probs
from tinyllama_ds.model.loss import IGNORE_INDEX, LMHeadLoss, chunked_cross_entropy, chunked_loss

ROWS, HIDDEN, VOCABULARY = 24, 16, 40


@pytest.fixture
def student() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight of the head, labels."""
    generator = torch.Generator().manual_seed(1)
    rows, weight = (torch.randn(n, HIDDEN, generator=generator, dtype=torch.float64) for n in (ROWS, VOCABULARY))
    return rows, weight, torch.randint(VOCABULARY, (ROWS,), generator=generator)


@pytest.fixture
def teacher() -> Tensor:
    return torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 3


def buckets(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of some tokens and of all others together, written out."""
    probs = log_probs.exp()
    kept = probs.gather(1, ids)
    others = probs.scatter(1, ids, 0.0).sum(dim=1, keepdim=True)
    return torch.cat((kept, others), dim=1).log()


def reference(logits: Tensor, labels: Tensor, teacher: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy and divergence by PyTorch, on whole logits."""
    ids = teacher.topk(k).indices
    flat = [F.log_softmax(buckets(F.log_softmax(each, 1), ids) / temperature, 1) for each in (logits, teacher.double())]
    counts = labels != IGNORE_INDEX
    divergence = F.kl_div(flat[0][counts], flat[1][counts], reduction="batchmean", log_target=True)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX), divergence


@pytest.mark.parametrize("chunk_rows", [5, 100])
@pytest.mark.parametrize("k", [1, 8, VOCABULARY - 1])
@pytest.mark.parametrize(("share", "temperature"), [(0.3, 1.0), (1.0, 2.0), (0.7, 0.5)])
def test_loss_and_gradients_equal_pytorch(
    student: tuple[Tensor, Tensor, Tensor], teacher: Tensor, chunk_rows: int, k: int, share: float, temperature: float
) -> None:
    rows, weight, labels = student
    labels[3:9] = IGNORE_INDEX
    exact = [rows.clone().requires_grad_(), weight.clone().requires_grad_()]
    cross_entropy, divergence = reference(exact[0] @ exact[1].t(), labels, teacher, k, temperature)
    expected = (1 - share) * cross_entropy + share * temperature**2 * divergence
    mine = [rows.float().requires_grad_(), weight.float().requires_grad_()]
    predicted = top_log_probs(teacher, k)
    losses = chunked_loss(*mine, (labels, *predicted), distillation_of(share, temperature), chunk_rows)
    torch.testing.assert_close(
        losses.double(), torch.stack((expected, cross_entropy, divergence)), rtol=1e-5, atol=1e-6
    )
    (losses[0] * 3).backward()
    (expected * 3).backward()
    for tensor, twin in zip(mine, exact, strict=True):
        torch.testing.assert_close(tensor.grad.double(), twin.grad, rtol=1e-4, atol=1e-5)


def test_with_all_tokens_it_is_the_loss_of_hinton(student: tuple[Tensor, Tensor, Tensor], teacher: Tensor) -> None:
    rows, weight, labels = student
    predicted = top_log_probs(teacher, VOCABULARY)
    losses = chunked_loss(rows.float(), weight.float(), (labels, *predicted), distillation_of(1.0, 3.0))
    flat = [F.log_softmax(logits / 3, dim=1) for logits in (rows @ weight.t(), teacher.double())]
    expected = 9 * F.kl_div(*flat, reduction="batchmean", log_target=True)
    torch.testing.assert_close(losses[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_rounded_to_fp16_the_divergence_is_the_same_to_a_thousandth(
    student: tuple[Tensor, Tensor, Tensor], teacher: Tensor
) -> None:
    rows, weight, labels = student
    _, expected = reference(rows @ weight.t(), labels, teacher, 8, 1.0)
    ids, log_probs = top_log_probs(teacher, 8)
    of_rows = (labels, ids.int(), log_probs.half())
    losses = chunked_loss(rows.float(), weight.float(), of_rows, distillation_of(0.5, 1.0))
    assert losses[2].item() == pytest.approx(expected.item(), rel=1e-3)


def test_a_certain_student_has_finite_gradients() -> None:
    """Both of what the teacher keeps and of what it does not."""
    rows = torch.eye(2).mul(1000.0).requires_grad_()
    teacher = torch.tensor([[0.0, 9.0, 0.0], [0.0, 900.0, 0.0]])
    labels = torch.tensor([0, 1])
    of_rows = (labels, *top_log_probs(teacher, 1))
    for temperature in (0.1, 1.0, 100.0):
        losses = chunked_loss(rows, torch.eye(3, 2), of_rows, distillation_of(0.5, temperature))
        losses[0].backward()
        assert losses.isfinite().all()
        assert rows.grad.isfinite().all()


def test_the_head_of_a_student_reports_the_cross_entropy(
    student: tuple[Tensor, Tensor, Tensor], teacher: Tensor
) -> None:
    rows, weight, labels = student
    head = LMHeadLoss(HIDDEN, VOCABULARY)
    head.weight.data = weight.float()
    head.distillation_and_grad = distillation_of(0.5, 1.0)
    ids, log_probs = top_log_probs(teacher, 4)
    inputs = rows.float()[None], labels[None], (ids[None], log_probs[None])
    loss, parts = head(*inputs)
    torch.testing.assert_close(parts[0], chunked_cross_entropy(rows.float(), head.weight, labels).detach())
    torch.testing.assert_close(loss.detach(), parts.mean())
    assert loss.requires_grad
    assert not parts.requires_grad
    with torch.no_grad():
        assert torch.equal(head(*inputs)[1], parts)


def test_the_compiled_form_is_the_same(student: tuple[Tensor, Tensor, Tensor], teacher: Tensor) -> None:
    rows, weight, labels = student
    labels[:5] = IGNORE_INDEX
    arguments = (rows @ weight.t()).float(), labels, torch.tensor(ROWS - 5), *top_log_probs(teacher, 6)
    of_chunk = distillation_of(0.4, 2.0)
    torch.testing.assert_close(torch.compile(of_chunk)(*arguments), of_chunk(*arguments))
