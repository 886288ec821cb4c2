"""The fake device refuses what CUDA refuses, takes what CUDA takes, and counts what the host waits for."""

from collections.abc import Callable, Iterator

import pytest
import torch
from fake_cuda import FakeCuda, MixedDevices


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with FakeCuda() as device:
        yield device


def on_gpu(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device="cuda")


REFUSED: dict[str, Callable[[], object]] = {
    "add": lambda: on_gpu(3) + torch.ones(3),
    "stack of 0-dim tensors": lambda: torch.stack((on_gpu(3).sum(), torch.ones(3).sum())),
    "cat": lambda: torch.cat((on_gpu(3), torch.ones(3))),
    "matmul": lambda: on_gpu(2, 2) @ torch.ones(2, 2),
    "a host tensor by indices of the GPU": lambda: torch.ones(3)[on_gpu(2).long()],
    "a result of the GPU into a host tensor": lambda: torch.ones(()).add_(on_gpu(1).sum()),
    "embedding": lambda: torch.nn.functional.embedding(torch.zeros(2, dtype=torch.int64), on_gpu(4, 2)),
    "where": lambda: torch.where(on_gpu(3) > 0, on_gpu(3), torch.zeros(3)),
    "gather": lambda: on_gpu(3, 3).gather(1, torch.zeros(3, 1, dtype=torch.int64)),
}
TAKEN: dict[str, Callable[[], torch.Tensor]] = {
    "a 0-dim host tensor": lambda: on_gpu(3) * torch.tensor(2.0),
    "a 0-dim host tensor in where": lambda: torch.where(on_gpu(3) > 0, on_gpu(3), torch.tensor(0.0)),
    "host indices": lambda: on_gpu(3)[torch.zeros(2, dtype=torch.int64)],
    "a number": lambda: on_gpu(3) * 2,
    "a slice that is set": lambda: on_gpu(3).index_fill_(0, on_gpu(1).long(), 0),
    "a move": lambda: torch.ones(3).to("cuda") + on_gpu(3),
    "like another": lambda: torch.zeros_like(on_gpu(3)) + on_gpu(3),
    "new_tensor": lambda: on_gpu(3).new_tensor([1.0]) + on_gpu(3),
    "as_tensor of a host tensor": lambda: torch.as_tensor(torch.ones(3), device="cuda") + on_gpu(3),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mixed_devices_raise(case: str, gpu: FakeCuda) -> None:
    with pytest.raises(MixedDevices):
        REFUSED[case]()


@pytest.mark.parametrize("case", TAKEN)
def test_what_cuda_takes_stays_on_the_device(case: str, gpu: FakeCuda) -> None:
    assert TAKEN[case]().device == torch.device("cuda", 0)


def test_the_device_is_seen_in_the_backward_pass_and_in_recomputed_blocks(gpu: FakeCuda) -> None:
    seen = []

    def block(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.device.type)
        return x * torch.ones(3, device=x.device)

    x = on_gpu(3).requires_grad_()
    x.register_hook(lambda gradient: seen.append(gradient.device.type))
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    assert seen == ["cuda"] * 3
    assert x.grad is not None
    assert x.grad.is_cuda


def test_a_fused_optimizer_takes_no_step_counter_in_host_memory(gpu: FakeCuda) -> None:
    """As after a load that bypasses `Optimizer.load_state_dict`."""
    weight = on_gpu(3).requires_grad_()
    optimizer = torch.optim.AdamW([weight], fused=True)
    for _ in range(2):
        weight.sum().backward()
        optimizer.step()
    optimizer.state[weight]["step"] = torch.tensor(2.0)
    with pytest.raises(MixedDevices, match=r"foreach_add|fused_adamw"):
        optimizer.step()


WAITING: dict[str, tuple[Callable[[], object], int]] = {
    "item": (lambda: on_gpu(1).item(), 1),
    "bool": (lambda: bool(on_gpu(1)), 1),
    "tolist": (lambda: on_gpu(3).tolist(), 1),
    "nonzero": (lambda: on_gpu(3).nonzero(), 1),
    "a mask as index": (lambda: on_gpu(3)[on_gpu(3) > 0], 1),
    "to host memory": (lambda: on_gpu(3).cpu(), 1),
    "from pageable memory": (lambda: torch.ones(3).to("cuda", non_blocking=True), 1),
    "from pinned memory, blocking": (lambda: torch.ones(3).pin_memory().to("cuda"), 1),
    "from pinned memory": (lambda: torch.ones(3).pin_memory().to("cuda", non_blocking=True), 0),
    "into pinned memory": (lambda: torch.ones(3).pin_memory().copy_(on_gpu(3), non_blocking=True), 0),
    "synchronize": (lambda: torch.cuda.synchronize(), 1),
    "arithmetic": (lambda: (on_gpu(3) * 2).sum(), 0),
    "item of a host tensor": (lambda: torch.ones(1).item(), 0),
}


@pytest.mark.parametrize("case", WAITING)
def test_waits_are_counted(case: str, gpu: FakeCuda) -> None:
    act, waits = WAITING[case]
    act()
    assert len(gpu.waits) == waits, gpu.waits


def test_numpy_needs_a_copy_to_host_memory(gpu: FakeCuda) -> None:
    with pytest.raises(TypeError):
        on_gpu(3).numpy()


def test_nothing_is_left_behind() -> None:
    with FakeCuda():
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()
    assert torch.ones(1).device.type == "cpu"
