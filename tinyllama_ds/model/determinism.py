"""The same input, the same bits, on GPUs too: what `--deterministic` switches on in a rank."""

import os

import torch

from tinyllama_ds.errors import ConfigError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS gives the same bits every time


def use_deterministic_kernels() -> None:
    """Choose deterministic kernels in this process; one that a GPU does not have is an error when it is called.

    Before CUDA starts, which reads cuBLAS's variable then. Raises `ConfigError` where that says something else.
    """
    workspace = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise ConfigError(
            f"{_WORKSPACE}={workspace} in the environment: --deterministic expects {' or '.join(_WORKSPACES)}, or unset"
        )
    # Not with warn_only: PyTorch's flash kernels would stay as they are, and only say so.
    torch.use_deterministic_algorithms(True)
    # On by default with it, to show reads of uninitialized memory; DeepSpeed's paddings would be filled at every step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def gives_same_bits(device: torch.device, deterministic: bool) -> bool:
    """Whether the same computation has the same bits in another process on such a device.

    Without `--deterministic` a GPU adds in any order, and the compiler times kernels and takes one or the other.
    """
    return device.type == "cpu" or deterministic
