"""Checks of hyperparameters, with the messages of torch.optim, and of what a step finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import state as state_storage
from .arguments import check_number, check_pair
from .optimizer import parameter_name
from .precision import FORMAT_OF_DTYPE, Storage
from .rules import MAY_BE_OFF, Hyper
from .state import local

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


def check_lr(lr: float | Tensor, *, foreach: bool | None = None, capturable: bool = False) -> None:
    """Raises unless ``lr`` is a nonnegative number or a one-element tensor."""
    if isinstance(lr, Tensor):
        if foreach and not capturable:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if lr.is_cuda:
            return  # reading it would wait for the device
    check_number("lr", lr)
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")


def check_nonnegative(**values: float) -> None:
    """Raises unless each value is at least zero, naming the option as torch.optim does (``eps`` is "epsilon")."""
    for name, value in values.items():
        check_number(name, value)
        if not value >= 0.0:
            raise ValueError(f"Invalid {'epsilon' if name == 'eps' else name} value: {value}")


def check_betas(betas: Sequence[float | Tensor], *, foreach: bool | None = None, capturable: bool = False) -> None:
    """Raises unless ``betas`` are two numbers, or one-element tensors, in [0, 1)."""
    check_pair("betas", betas)
    kinds = {isinstance(beta, Tensor) for beta in betas}
    if len(kinds) != 1:
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
        check_number(f"betas[{index}]", beta)
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")


def check_implementation(foreach: Any, fused: Any, differentiable: bool) -> None:
    """Raises where torch.optim does for combinations of the implementation flags."""
    if fused and differentiable:
        raise RuntimeError("`fused` does not support `differentiable`")
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def check_hypers(groups: Sequence[dict[str, Any]], hypers: Sequence[Sequence[Hyper]]) -> None:
    """Raises where an option of a live group, of those that its rule reads, is missing or no number."""
    for number, (group, wanted) in enumerate(zip(groups, hypers, strict=True)):
        for key, item in wanted:
            if key not in group:
                raise KeyError(f"parameter group {number} has no option '{key}'")
            name, value = f"option '{key}' of parameter group {number}", group[key]
            if item >= 0:
                check_pair(name, value)
                value = value[item]
            if value is None and (key, item) in MAY_BE_OFF:
                continue
            check_number(name, value)
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")


def check_row(optimizer: FusedOptimizer, group: dict[str, Any], index: int, param: Tensor) -> None:
    """Raises where a parameter, its gradient or its state has no step, naming the parameter.

    Args:
        optimizer: the parameter's.
        group: the parameter's.
        index: within the group.
        param: the parameter.
    """
    grad = param.grad
    if grad is None:
        return
    name = parameter_name(group, index)
    if grad.layout != torch.strided:
        kind = type(optimizer).__name__
        raise RuntimeError(f"{kind} does not support sparse gradients ({grad.layout} of {name})")
    if grad.shape != param.shape or local(grad).device != local(param).device:
        raise RuntimeError(
            f"the gradient of {name} has shape {tuple(grad.shape)} on {grad.device}, "
            f"its parameter {tuple(param.shape)} on {param.device}"
        )
    for kind, tensor in (("parameter", param), ("gradient", grad)):
        if tensor.dtype not in FORMAT_OF_DTYPE:
            raise RuntimeError(f"the {kind} of {name} has dtype {tensor.dtype}, which has no optimizer step")
    if not torch.compiler.is_compiling() and (param.is_conj() or param.is_neg()):
        raise RuntimeError(f"{name} is a conjugated or negated view: make it with resolve_conj() or resolve_neg()")
    Storage.of(group).check(param, name)
    state = state_storage.adopt(optimizer.state.get(param, {}))
    state_storage.check_state(state, optimizer._rule(group), param, name)
