"""Muon as published (Jordan 2024, https://kellerjordan.github.io/posts/muon), for plain loops: one matrix at a time."""

from collections.abc import Iterable
from math import sqrt

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized in `dtype`, decoupled weight decay: torch.optim.Muon, which has only bf16."""

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalized(matrix.grad.lerp(momentum, group["momentum"]).to(self.dtype))
                rows, columns = matrix.shape
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * sqrt(max(1, rows / columns)))


def orthogonalized(matrix: Tensor) -> Tensor:
    """Five steps of the quintic Newton-Schulz iteration: the singular values come close to 1."""
    X = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    X = X / (X.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if matrix.shape[0] > matrix.shape[1] else X
