"""Deterministic kernels on GPUs: what `--deterministic` enables in a rank."""

import os

import torch

from tinyllama_ds.errors import ConfigError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS gives the same bits every time


def use_deterministic_kernels() -> None:
    """Choose deterministic kernels in this process; one that a GPU does not have is an error when it is called.

    Call it before CUDA starts, which reads cuBLAS's variable. Raises `ConfigError` for another value of that variable.
    """
    workspace = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise ConfigError(
            f"{_WORKSPACE}={workspace} in the environment: --deterministic expects {' or '.join(_WORKSPACES)}, or unset"
        )
    # Not with warn_only: PyTorch's flash kernels would stay non-deterministic and only warn.
    torch.use_deterministic_algorithms(True)
    # On by default with it, to show reads of uninitialized memory; DeepSpeed's padding would be filled at every step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def gives_same_bits(device: torch.device, deterministic: bool) -> bool:
    """Whether the same computation has the same bits in another process on such a device.

    Without `--deterministic` a GPU adds in any order, and the compiler chooses kernels by timing them.
    """
    return device.type == "cpu" or deterministic
