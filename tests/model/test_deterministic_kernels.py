"""What `--deterministic` switches on in a rank."""

import os
from collections.abc import Iterator

import pytest
import torch

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.determinism import gives_same_bits, use_deterministic_kernels
from tinyllama_ds.model.loss import loss_and_grad


@pytest.fixture(autouse=True)
def switched_back() -> Iterator[None]:
    before = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def test_all_switches_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    use_deterministic_kernels()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # flash kernels would not be
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_the_other_workspace_is_left_and_a_third_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_deterministic_kernels()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    with pytest.raises(
        ConfigError, match="CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8 in the environment: --deterministic expec"
    ):
        use_deterministic_kernels()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_compiled_loss_stays_the_same() -> None:
    """Its scatter becomes a kernel of its own, because the compiler's would add in any order."""
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(40, 97, generator=generator), torch.randint(97, (40,), generator=generator)
    labels[::7] = -100
    expected = loss_and_grad(logits, labels, torch.tensor(34))
    use_deterministic_kernels()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss_and_grad)(logits, labels, torch.tensor(34)), expected)


def test_bits_are_expected_of_a_gpu_with_the_flag_alone() -> None:
    """A good checkpoint that a GPU gives another last bit of the probe's loss for is not to be rejected."""
    expected = {("cpu", False): True, ("cpu", True): True, ("cuda", False): False, ("cuda", True): True}
    assert {case: gives_same_bits(torch.device(case[0]), case[1]) for case in expected} == expected
