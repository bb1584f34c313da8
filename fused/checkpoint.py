"""Float32 weights in and out of low-precision parameters: what an export or a change of precision needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .optimizer import FusedOptimizer
from .precision import REMAINDER_DTYPE
from .state import MASTER, adopt, local, put_remainder, wide_master

Optimizers = FusedOptimizer | list[FusedOptimizer] | tuple[FusedOptimizer, ...]


def master_state_dict(model: nn.Module, optimizer: Optimizers) -> dict[str, Any]:
    r"""The model's ``state_dict`` with float32 weights: masters, or parameters joined with their remainders.

    .. math:: w = \text{master}, \quad w = \operatorname{join}(p, \text{remainder}), \quad \text{or} \quad w = p

    Args:
        model: a module of any parameters; those in float64 or complex dtypes and all buffers are exported as they are.
        optimizer: the optimizer, or several, that step the model's parameters. A parameter without state exports
            its value.

    Returns:
        Keys of ``model.state_dict()``. Float32 masters and parameters that are wide already are not copied: save the
        dictionary, or copy it, before the next step. Others are converted one at a time, when they are reached.

    Numerics:
        With ``master_weights="fp32"``, and with ``"split"`` for bfloat16, exactly the weights that training sees.

    Raises:
        TypeError: ``optimizer`` is not one of this package's.

    Example:
        >>> torch.save(fused.master_state_dict(model, optimizer), "weights.pt")
    """
    states = _states(optimizer)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    result: dict[str, Any] = {}
    done: dict[Tensor, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and name in parameters:
            if value not in done:  # tied weights stay tied
                done[value] = _wide(value, states.get(value, {}))
            result[name] = done[value]
        else:
            result[name] = value.detach() if isinstance(value, Tensor) else value
    return result


def load_master_state_dict(
    model: nn.Module, optimizer: Optimizers, state_dict: Mapping[str, Any], *, strict: bool = True
) -> None:
    """Sets a model's weights from float32 ones: parameters, and the masters or remainders beside them.

    Args:
        model: the module; its parameters keep their dtypes.
        optimizer: the optimizer, or several, that step the model's parameters.
        state_dict: as :func:`master_state_dict` returns, or any ``state_dict`` of the model, in any float dtypes.
        strict: raise where keys are missing or unknown.

    State:
        ``master`` or ``remainder`` is created where the options ask for it; moments and step counts stay as they are.

    Raises:
        KeyError: ``strict``, and keys are missing or unknown; the message lists them.
        ValueError: a shape does not fit; the message names the key. Nothing has changed then.
        TypeError: ``optimizer`` is not one of this package's.

    Example:
        >>> fused.load_master_state_dict(model, optimizer, torch.load("weights.pt"))
    """
    states, groups = _states(optimizer), _groups(optimizer)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = model.state_dict(keep_vars=True)
    missing, unknown = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    if strict and (missing or unknown):
        raise KeyError(f"missing keys: {missing}, unknown keys: {unknown}")
    for name, value in own.items():
        given = state_dict.get(name)
        if isinstance(value, Tensor) and isinstance(given, Tensor) and given.shape != value.shape:
            raise ValueError(f"'{name}' of shape {tuple(given.shape)} does not fit shape {tuple(value.shape)}")
    others = {name: state_dict[name] for name in own if name in state_dict and name not in parameters}
    model.load_state_dict(others, strict=False)
    with torch.no_grad():
        for name, param in parameters.items():
            if name in own and name in state_dict:
                _assign(param, state_dict[name], states.get(param), groups.get(param, {}))


def _list(optimizer: Optimizers) -> list[FusedOptimizer]:
    every = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    for one in every:
        if not isinstance(one, FusedOptimizer):
            raise TypeError(f"needs an optimizer of this package, not {type(one).__name__}")
    return every


def _states(optimizer: Optimizers) -> dict[Tensor, dict[str, Any]]:
    """The state of every parameter the optimizers step: an empty one, in its place, where there is none yet."""
    return {param: adopt(one.state[param]) for one in _list(optimizer) for _, _, param in one._parameters()}


def _groups(optimizer: Optimizers) -> dict[Tensor, dict[str, Any]]:
    return {param: one.param_groups[group] for one in _list(optimizer) for group, _, param in one._parameters()}


def _wide(param: Tensor, state: dict[str, Any]) -> Tensor:
    low = param.dtype in (torch.bfloat16, torch.float16)
    return wide_master(param, state) if low else param.detach()


def _assign(param: Tensor, value: Tensor, state: dict[str, Any] | None, group: Mapping[str, Any]) -> None:
    kind = group.get("master_weights")
    if state is None or kind is None:
        param.copy_(value)
        return
    if kind == "fp32":
        if MASTER not in state:
            state[MASTER] = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
        param.copy_(state[MASTER].copy_(value))
        return
    if local(param) is not param:  # divided between processes, the value perhaps otherwise
        value = torch.empty_like(param, dtype=torch.float32, requires_grad=False).copy_(value)
    put_remainder(param, state, value, REMAINDER_DTYPE[kind])
