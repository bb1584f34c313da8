"""Checks of hyperparameters, with the messages of torch.optim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def check_lr(lr: float | Tensor, *, foreach: bool | None = None, capturable: bool = False) -> None:
    """Raises unless ``lr`` is a nonnegative number or a one-element tensor."""
    if isinstance(lr, Tensor):
        if foreach and not capturable:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if lr.is_cuda:
            return  # reading it would wait for the device
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")


def check_nonnegative(**values: float) -> None:
    """Raises unless each value is at least zero, naming the option as torch.optim does (``eps`` is "epsilon")."""
    for name, value in values.items():
        if not value >= 0.0:
            raise ValueError(f"Invalid {'epsilon' if name == 'eps' else name} value: {value}")


def check_betas(betas: Sequence[float | Tensor], *, foreach: bool | None = None, capturable: bool = False) -> None:
    """Raises unless ``betas`` are two numbers, or one-element tensors, in [0, 1)."""
    kinds = {isinstance(beta, Tensor) for beta in betas}
    if len(betas) != 2 or len(kinds) != 1:
        raise ValueError(f"betas must be either both floats or both Tensors, got {tuple(betas)}")
    for index, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            if not capturable and foreach:
                raise ValueError(
                    f"betas[{index}] as a Tensor is not supported for capturable=False and foreach=True"
                )
            if beta.numel() != 1:
                raise ValueError(f"Tensor betas[{index}] must be 1-element")
            if beta.is_cuda:
                continue
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")


def check_implementation(foreach: Any, fused: Any, differentiable: bool) -> None:
    """Raises where torch.optim does for combinations of the implementation flags."""
    if fused and differentiable:
        raise RuntimeError("`fused` does not support `differentiable`")
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
