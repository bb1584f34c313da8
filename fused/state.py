"""Creating, loading and converting optimizer state: one place that knows which tensors a parameter owns."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import formats
from .precision import REMAINDER_DTYPE, Storage, blocks8
from .rules import Rule

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

MASTER = "master"
REMAINDER = "remainder"
SCALE = "_scale"
"""Suffix of the key that holds the block scales of an 8-bit state."""


class Saved:
    """State on its way through torch's ``load_state_dict``, which would cast tensors to the parameter's dtype."""

    def __init__(self, value: Any, copy: bool = True) -> None:
        self.value = value
        self.copy = copy  # False: the tensors may be taken over

    def __deepcopy__(self, memo: dict[int, Any]) -> Saved:
        return self


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


def real(tensor: Tensor) -> Tensor:
    """Complex tensors as pairs of reals."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def initialize(optimizer: FusedOptimizer, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """Fills in what the state of ``param`` lacks, and returns it."""
    state: dict[str, Any] = optimizer.state[param]
    rule, storage = optimizer._rule(group), Storage.of(group)
    if optimizer._counts_steps(group) and "step" not in state:
        # Where history is already there, as from an optimizer that keeps no count, this is not the first step.
        history = any(state.get(name) is not None for name in rule.states)
        state["step"] = torch.full((), float(history), dtype=torch.float32, device=param.device)
    _initialize_master(state, storage, param)
    for name in rule.states:
        if state.get(name) is None:
            value = optimizer._init_state(group, name, param.detach())
            _put(state, rule, name, value, storage.dtype_of_state(param))
        else:
            _follow_double(state, name, param)
    optimizer._complete_state(group, param.detach(), state)
    return state


_DOUBLE = (torch.float64, torch.complex128)


def _follow_double(state: dict[str, Any], name: str, param: Tensor) -> None:
    """Takes a state to float64, or back, where its parameter was: float64 arithmetic keeps nothing narrower."""
    value = state[name]
    if (value.dtype in _DOUBLE) != (param.dtype in _DOUBLE):
        narrow = torch.complex64 if value.is_complex() else torch.float32
        state[name] = value.to(param.dtype if param.dtype in _DOUBLE else narrow)


def check_shapes(state: dict[str, Any], rule: Rule, param: Tensor, called: str) -> None:
    """Raises where a state does not have the shape of its parameter, as where ``p.data`` was replaced by another."""
    for name in rule.states:
        value = state.get(name)
        if value is not None and value.shape != param.shape:
            raise RuntimeError(
                f"state '{name}' of {called} has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}"
            )


def _initialize_master(state: dict[str, Any], storage: Storage, param: Tensor) -> None:
    """Makes the master or remainder that ``storage`` asks for, out of the one that is there or of the parameter.

    Not when a checkpoint is loaded, but before the first step after it: model and optimizer may be loaded in any order.
    """
    wanted = REMAINDER_DTYPE.get(storage.master_weights or "")
    if storage.master_weights == "fp32":
        if MASTER not in state:
            state[MASTER] = wide_master(param, state)
        state.pop(REMAINDER, None)
    elif wanted is None:
        state.pop(MASTER, None)
        state.pop(REMAINDER, None)
    elif MASTER in state or (REMAINDER in state and state[REMAINDER].dtype != wanted):
        put_remainder(param, state, wide_master(param, state), wanted)
    elif REMAINDER not in state:
        state[REMAINDER] = torch.zeros_like(param, dtype=wanted, requires_grad=False)


def wide_master(param: Tensor, state: dict[str, Any]) -> Tensor:
    """The float32 weights behind a bfloat16 or float16 parameter: its master itself, or a new tensor."""
    if MASTER in state:
        master: Tensor = state[MASTER]
        return master
    wide = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
    if REMAINDER in state:
        local(wide).copy_(formats.join_master(local(param.detach()), local(state[REMAINDER])))
    else:
        wide.copy_(param.detach())
    return wide


def put_remainder(param: Tensor, state: dict[str, Any], master: Tensor, dtype: torch.dtype) -> None:
    """Divides a float32 master between the parameter and a remainder of ``dtype``, which replaces it in the state."""
    high, low = formats.split_master(local(master), param.dtype, 16 if dtype == torch.int16 else 8)
    with torch.no_grad():
        local(param.detach()).copy_(high)
    state.pop(MASTER, None)
    state[REMAINDER] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
    local(state[REMAINDER]).copy_(low)


def _put(state: dict[str, Any], rule: Rule, name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Stores a state tensor in ``dtype``."""
    if dtype is torch.uint8:
        dense = local(value).to(torch.float32)
        codes, scales = formats.encode_blocks8(in_memory_order(dense), signed=name not in rule.nonnegative)
        state[name] = torch.empty_like(value, dtype=torch.uint8)
        in_memory_order(local(state[name])).copy_(codes)
        state[name + SCALE] = scales
    else:
        state[name] = value.to(dtype) if value.dtype != dtype else value


def in_memory_order(tensor: Tensor) -> Tensor:
    """A dense tensor as a one-dimensional view of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def restore(optimizer: FusedOptimizer, state: Any, groups: list[dict[str, Any]]) -> Any:
    """State as loaded or unpickled, made fit for use: devices, dtypes and layouts. Touches neither argument."""
    restored: defaultdict[Any, Any] = defaultdict(dict)
    owner = {param: group for group in groups for param in group["params"]}
    for key, value in state.items():
        if isinstance(value, Saved):
            group = owner.get(key)
            restored[key] = value.value if group is None else _restore_one(optimizer, group, key, value)
        else:
            restored[key] = value
    return restored


def _restore_one(optimizer: FusedOptimizer, group: dict[str, Any], param: Tensor, saved: Saved) -> dict[str, Any]:
    storage = Storage.of(group)
    rule = optimizer._rule(group)
    storage.check(param, f"the parameter of shape {tuple(param.shape)}")
    result: dict[str, Any] = {}
    for name, value in saved.value.items():
        if name == "step":
            # A tensor on the parameter's device, whatever an older or non-capturable optimizer kept.
            result[name] = torch.as_tensor(value, dtype=torch.float32).to(param.device, copy=saved.copy).reshape(())
        elif isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            if name in rule.states and value.shape != param.shape:
                raise ValueError(
                    f"state '{name}' of shape {tuple(value.shape)} does not fit its parameter "
                    f"of shape {tuple(param.shape)}"
                )
            moved = value.detach().to(param.device, copy=saved.copy)
            if name in rule.states:
                _put(result, rule, name, moved, _loaded_dtype(storage, param, moved))
            else:
                result[name] = moved
        elif isinstance(value, Tensor):
            result[name] = value.detach().to(param.device, copy=saved.copy)
        elif value is not None:
            result[name] = value
    _dequantize_unless(storage, param, rule, result)
    optimizer._complete_state(group, param.detach(), result)
    return result


def _loaded_dtype(storage: Storage, param: Tensor, value: Tensor) -> torch.dtype:
    if storage.state_dtype is not None:
        return storage.dtype_of_state(param)
    if param.dtype in (torch.float64, torch.complex128, torch.complex64):
        return param.dtype
    return value.dtype if value.dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32


def _dequantize_unless(storage: Storage, param: Tensor, rule: Rule, state: dict[str, Any]) -> None:
    """8-bit states that were loaded where another ``state_dtype`` is asked for."""
    if storage.state_dtype == "int8":
        return
    for name in rule.states:
        scale = state.pop(name + SCALE, None)
        if scale is not None:
            codes = in_memory_order(local(state[name]))
            wide = torch.empty_like(state[name], dtype=torch.float32)
            in_memory_order(local(wide)).copy_(formats.decode_blocks8(codes, scale, name not in rule.nonnegative))
            state[name] = wide.to(storage.dtype_of_state(param))


def state_bytes(state: dict[str, Any]) -> dict[str, int]:
    """Bytes per tensor of one parameter's state."""
    return {
        name: local(value).numel() * value.element_size() for name, value in state.items() if isinstance(value, Tensor)
    }


__all__ = [
    "MASTER",
    "REMAINDER",
    "SCALE",
    "Saved",
    "blocks8",
    "in_memory_order",
    "initialize",
    "local",
    "real",
    "restore",
]
