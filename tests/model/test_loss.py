"""The chunked loss against PyTorch's cross-entropy on whole logits."""

import pytest
import torch
from largest_tensor import LargestTensor

from tinyllama_ds.model import loss
from tinyllama_ds.model.loss import IGNORE_INDEX, LMHeadLoss, chunked_cross_entropy


@pytest.mark.parametrize("chunk_rows", [1, 7, 16, 100])
@pytest.mark.parametrize("ignored", [0, 5, 31])
def test_loss_and_gradients_equal_pytorch(chunk_rows: int, ignored: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, weight = (torch.randn(n, 24, generator=generator, dtype=torch.float64) for n in (32, 50))
    labels = torch.randint(50, (32,), generator=generator)
    labels[:ignored] = IGNORE_INDEX
    mine = [rows.float().requires_grad_(), weight.float().requires_grad_()]
    exact = [rows.requires_grad_(), weight.requires_grad_()]
    loss = chunked_cross_entropy(*mine, labels, chunk_rows)
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), labels, ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (loss * 3).backward()
    (expected * 3).backward()
    for tensor, twin in zip(mine, exact, strict=True):
        torch.testing.assert_close(tensor.grad.double(), twin.grad, rtol=1e-4, atol=1e-6)


def test_no_target_is_no_loss_and_no_gradient() -> None:
    rows, weight = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    loss = chunked_cross_entropy(rows, weight, torch.full((4,), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert not rows.grad.any()
    assert not weight.grad.any()


def test_never_holds_the_logits_of_the_batch() -> None:
    """The largest tensor that the loss makes is one chunk of logits, seen through PyTorch's dispatcher."""
    rows, weight = torch.randn(512, 16, requires_grad=True), torch.randn(1000, 16, requires_grad=True)
    labels = torch.randint(1000, (512,))
    with LargestTensor() as largest:
        chunked_cross_entropy(rows, weight, labels, chunk_rows=32).backward()
    assert largest.elements == 32 * 1000


def test_the_loss_of_each_target_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In three chunks, the last one shorter."""
    head = LMHeadLoss(8, 20)
    monkeypatch.setitem(loss.MAX_CHUNK_LOGITS, "cpu", 20 * 3)
    torch.nn.init.normal_(head.weight)
    hidden, labels = torch.randn(2, 4, 8), torch.randint(20, (2, 4))
    labels[0, 1:] = IGNORE_INDEX
    found = head(hidden, labels, reduction="none")
    assert not found.requires_grad
    torch.testing.assert_close(
        found, torch.nn.functional.cross_entropy(head(hidden).transpose(1, 2), labels, reduction="none")
    )


def test_without_labels_the_head_gives_logits() -> None:
    head = LMHeadLoss(8, 20)
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(2, 3, 8)
    assert torch.equal(head(hidden), hidden @ head.weight.t())


def test_without_gradients_there_is_one_product_and_no_gradient_buffer() -> None:
    """A validation batch: inside an autograd function `requires_grad` of a weight is true whatever the caller said."""
    operators: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operators.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    head = LMHeadLoss(16, 100)
    torch.nn.init.normal_(head.weight)
    hidden, labels = torch.randn(1, 32, 16), torch.randint(100, (1, 32))
    with Watch(), torch.no_grad():
        loss = head(hidden, labels)
    assert operators.count("mm") == 1
    assert loss == head(hidden, labels).detach()
