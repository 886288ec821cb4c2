"""What counts as out of memory: on a GPU, in PyTorch's allocator for the host, in Python and in the kernel."""

import errno
from collections.abc import Callable

import pytest
import torch

from tinyllama_ds.train.pretrain import is_out_of_memory


def of_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def of_kernel() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


@pytest.mark.parametrize(
    "exhaust", [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytes(2**60), of_gpu, of_kernel]
)
def test_out_of_memory_is_recognized_by_its_error(exhaust: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError, OSError)) as caught:
        exhaust()
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape"), OSError(errno.EIO, "disk"), ValueError(), KeyboardInterrupt()]
)
def test_other_errors_are_others(error: BaseException) -> None:
    assert not is_out_of_memory(error)
