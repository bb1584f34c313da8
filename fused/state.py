"""Creating, loading and converting optimizer state: one place that knows which tensors a parameter owns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import formats, sharding
from .precision import BLOCK8, REMAINDER_DTYPE, Storage, blocks8
from .rules import Rule

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

MASTER = "master"
REMAINDER = "remainder"
SCALE = "_scale"
"""Suffix of the key that holds the block scales of an 8-bit state."""

PIECE = 1 << 16
"""Elements converted at a time: in torch operations a conversion needs many times the memory of what it converts."""


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


def scale_shape(tensor: Tensor) -> tuple[int, ...]:
    """Shape of the scales beside an 8-bit state; beside a DTensor each part has its own blocks, and a row of them."""
    return (*sharding.parts(tensor), blocks8(sharding.largest_part(tensor)))


def scales_of(state: Mapping[str, Any], name: str) -> Tensor:
    """One scale for each block of this process's part of an 8-bit state, in a view."""
    scales: Tensor = local(state[name + SCALE]).view(-1)
    return scales[: blocks8(local(state[name]).numel())]


def initialize(optimizer: FusedOptimizer, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """Fills in what the state of ``param`` lacks, and returns it."""
    state: dict[str, Any] = optimizer.state[param]
    rule, storage = optimizer._rule(group), Storage.of(group)
    if optimizer._counts_steps(group) and "step" not in state:
        # Where history is already there, as from an optimizer that keeps no count, this is not the first step.
        history = any(state.get(name) is not None for name in rule.states)
        state["step"] = torch.full((), float(history), dtype=torch.float32, device=param.device)
    elif "step" in state:
        state["step"] = _step(state["step"], param)
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


def _step(value: Any, param: Tensor) -> Tensor:
    """A step count as the engine keeps it, whatever an older or non-capturable optimizer kept."""
    if isinstance(value, Tensor) and value.dtype == torch.float32 and value.device == param.device and value.ndim == 0:
        return value
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
    return tensor.to(param.device, torch.float32).reshape(())


def check_state(state: dict[str, Any], rule: Rule, param: Tensor, called: str) -> None:
    """Raises where a state does not fit its parameter, as where ``p.data`` was replaced by another, or state moved."""
    problem = _misfit(state, rule, param, called)
    if problem:
        raise RuntimeError(problem)
    for name in (*rule.states, MASTER, REMAINDER):
        value = state.get(name)
        if value is not None and local(value).device != local(param).device:
            raise RuntimeError(f"state '{name}' of {called} is on {value.device}, its parameter on {param.device}")


def _misfit(state: dict[str, Any], rule: Rule, param: Tensor, called: str) -> str:
    """What is wrong with the shapes of a state; nothing if they fit."""
    for name in (*rule.states, MASTER, REMAINDER):
        value = state.get(name)
        if value is None:
            continue
        if value.shape != param.shape:
            return f"state '{name}' of {called} has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}"
        if local(value).shape != local(param).shape:  # a whole one beside a DTensor, or divided in another way
            return (
                f"state '{name}' of {called} is here of shape {tuple(local(value).shape)}, its parameter's part of "
                f"shape {tuple(local(param).shape)}: torch.distributed.checkpoint.state_dict divides whole states"
            )
        if value.dtype == torch.uint8:
            scale, shape = state.get(name + SCALE), scale_shape(param)
            if scale is None or tuple(scale.shape) != shape or scale.dtype is not torch.int16:
                count = " x ".join(map(str, shape))
                return f"state '{name}' of {called} is in 8 bits and needs {count} numbers in '{name + SCALE}'"
    return ""


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
    elif MASTER in state:
        put_remainder(param, state, state[MASTER], wanted)
    elif REMAINDER in state and state[REMAINDER].dtype != wanted:
        put_remainder(param, state, None, wanted)
    elif REMAINDER not in state:
        state[REMAINDER] = torch.zeros_like(param, dtype=wanted, requires_grad=False)


def wide_master(param: Tensor, state: dict[str, Any]) -> Tensor:
    """The float32 weights behind a bfloat16 or float16 parameter: its master itself, or a new tensor."""
    if MASTER in state:
        master: Tensor = state[MASTER]
        return master
    wide = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
    if REMAINDER not in state:
        return wide.copy_(param.detach())
    for master, high, low in _pieces(local(wide), local(param.detach()), local(state[REMAINDER])):
        master.copy_(formats.join_master(high, low))
    return wide


def put_remainder(param: Tensor, state: dict[str, Any], master: Tensor | None, dtype: torch.dtype) -> None:
    """Divides a master between the parameter and a remainder of ``dtype``, which replaces it in the state.

    Args:
        param: the parameter.
        state: its state.
        master: of any float dtype; None: the one that the parameter and its present remainder are.
        dtype: of the new remainder.
    """
    remainder = state.get(REMAINDER)
    if remainder is None or remainder.dtype != dtype:
        remainder = torch.zeros_like(param, dtype=dtype, requires_grad=False)
    bits = 16 if dtype == torch.int16 else 8
    with torch.no_grad():
        source = local(state[REMAINDER] if master is None else master)
        for high, low, part in _pieces(local(param.detach()), local(remainder), source):
            wide = formats.join_master(high, part) if master is None else part.to(high.device, torch.float32)
            value, rest = formats.split_master(wide, param.dtype, bits)
            high.copy_(value)
            low.copy_(rest)
    state.pop(MASTER, None)
    state[REMAINDER] = remainder


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, in views of about ``PIECE`` elements each, the same places of all together."""
    shape = tensors[0].shape
    numel = tensors[0].numel()
    if numel <= PIECE:
        yield tensors
        return
    longest = max(range(len(shape)), key=shape.__getitem__)
    size = max(1, PIECE * shape[longest] // numel)
    yield from zip(*(tensor.split(size, longest) for tensor in tensors), strict=True)


def _put(
    state: dict[str, Any], rule: Rule, name: str, value: Tensor, dtype: torch.dtype, *, copy: bool = False
) -> None:
    """Stores a state tensor in ``dtype``; ``copy``: in memory of its own."""
    if dtype is not torch.uint8:
        state[name] = value.to(dtype, copy=copy)
        return
    codes = torch.empty_like(value, dtype=torch.uint8)
    dense = local(value)
    if dense.stride() != local(codes).stride():  # it has gaps or overlaps
        dense = torch.empty_like(local(codes), dtype=value.dtype).copy_(dense)
    row = torch.zeros(scale_shape(value)[-1], dtype=torch.int16, device=dense.device)
    state[name], state[name + SCALE] = codes, sharding.beside(value, row)
    scales = scales_of(state, name)
    flat, out = in_memory_order(dense), in_memory_order(local(codes))
    for start in range(0, dense.numel(), PIECE):  # a multiple of the block
        part = slice(start, start + PIECE)
        out[part], scales[start // BLOCK8 : (start + PIECE) // BLOCK8] = formats.encode_blocks8(
            flat[part].to(torch.float32), signed=name not in rule.nonnegative
        )


def in_memory_order(tensor: Tensor) -> Tensor:
    """A dense tensor as a one-dimensional view of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def saved_form(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one parameter as a ``state_dict`` holds it: 16-bit integers as pairs of bytes, in views.

    Neither Gloo nor NCCL carries 16-bit integers, so that gathering or broadcasting them fails.
    """
    return {
        name: _as_bytes(value) if isinstance(value, Tensor) and value.dtype is torch.int16 else value
        for name, value in state.items()
    }


def live_form(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`saved_form`; what is no pairs of bytes stays as it is."""
    return {
        name: _from_bytes(value)
        if isinstance(value, Tensor)
        and value.dtype is torch.uint8
        and (name == REMAINDER or name.endswith(SCALE))
        and value.shape[-1:] == (2,)
        else value
        for name, value in state.items()
    }


def adopt(state: dict[str, Any]) -> dict[str, Any]:
    """Takes state that was put in place as a ``state_dict`` holds it to its live form, and returns it.

    ``ZeroRedundancyOptimizer`` loads so, without asking the optimizer.
    """
    for name, value in live_form(state).items():
        if value is not state[name]:
            state[name] = value
    return state


def _as_bytes(words: Tensor) -> Tensor:
    part = local(words).unsqueeze(-1).view(torch.uint8)
    return sharding.with_part(words, part, (*words.shape, 2), (*(2 * step for step in words.stride()), 1))


def _from_bytes(pairs: Tensor) -> Tensor:
    part = local(pairs)
    if part.stride(-1) != 1 or part.storage_offset() % 2 or any(step % 2 for step in part.stride()[:-1]):
        part = part.clone(memory_format=torch.contiguous_format)
    part = part.view(torch.int16).squeeze(-1)
    return sharding.with_part(pairs, part, pairs.shape[:-1], [step // 2 for step in pairs.stride()[:-1]])


def restore(
    optimizer: FusedOptimizer, state: Any, groups: list[dict[str, Any]], replaced: MutableMapping[Any, Any]
) -> Any:
    """State as loaded or unpickled, made fit for use: devices, dtypes and layouts.

    Args:
        optimizer: whose state it becomes.
        state: by parameter; what is :class:`Saved` is checked before anything changes, and left as it is.
        groups: parameter groups to be.
        replaced: the state until now. A parameter's is taken out before its successor is made, so that there are never
            two states in memory; tensors that are among the saved ones are taken over.

    Raises:
        ValueError: a state does not fit its parameter.
    """
    restored: defaultdict[Any, Any] = defaultdict(dict)
    owner = {param: group for group in groups for param in group["params"]}
    for key, value in state.items():
        if isinstance(value, Saved) and key in owner:
            _check_saved(optimizer, owner[key], key, value.value)
    for key, value in state.items():
        own = {_place(tensor) for tensor in replaced.pop(key, {}).values()}
        if not isinstance(value, Saved):
            restored[key] = value
        elif key not in owner:
            restored[key] = value.value
        else:
            restored[key] = _restore_one(optimizer, owner[key], key, value, own)
    return restored


def _check_saved(optimizer: FusedOptimizer, group: dict[str, Any], param: Tensor, saved: dict[str, Any]) -> None:
    called = f"the parameter of shape {tuple(param.shape)}"
    Storage.of(group).check(param, called)
    problem = _misfit(saved, optimizer._rule(group), param, called)
    if problem:
        raise ValueError(problem)
    step = saved.get("step")
    if isinstance(step, Tensor) and step.numel() != 1:
        raise ValueError(f"state 'step' of {called} has shape {tuple(step.shape)}: it is one number")
    optimizer._check_state(group, param.detach(), saved)


def _restore_one(
    optimizer: FusedOptimizer, group: dict[str, Any], param: Tensor, saved: Saved, own: set[Any]
) -> dict[str, Any]:
    """The state of one parameter; tensors whose places are in ``own`` are not copied."""
    storage = Storage.of(group)
    rule = optimizer._rule(group)
    result: dict[str, Any] = {}
    for name, value in saved.value.items():
        copy = saved.copy and _place(value) not in own
        if name == "step":
            step = _step(value, param)
            shared = isinstance(value, Tensor) and step.data_ptr() == value.data_ptr()
            result[name] = step.clone() if copy and shared else step
        elif not isinstance(value, Tensor):
            if value is not None:
                result[name] = value
        elif name in rule.states and (value.is_floating_point() or value.is_complex()):
            moved = value.detach().to(param.device)
            stays = moved.data_ptr() == value.data_ptr()
            _put(result, rule, name, moved, _loaded_dtype(storage, param, moved), copy=copy and stays)
        else:
            result[name] = value.detach().to(param.device, copy=copy)
    _dequantize_unless(storage, param, rule, result)
    optimizer._complete_state(group, param.detach(), result)
    return result


def _place(value: Any) -> Any:
    """The memory that a tensor shows, the same for every object that shows it alike."""
    if not isinstance(value, Tensor):
        return None
    part = local(value)
    return part.device, part.data_ptr(), part.dtype, part.shape, part.stride()


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
        if name + SCALE in state:
            scale = scales_of(state, name)
            del state[name + SCALE]
            wide = torch.empty_like(state[name], dtype=storage.dtype_of_state(param))
            codes, out = in_memory_order(local(state[name])), in_memory_order(local(wide))
            for start in range(0, out.numel(), PIECE):
                part, blocks = slice(start, start + PIECE), slice(start // BLOCK8, (start + PIECE) // BLOCK8)
                out[part] = formats.decode_blocks8(codes[part], scale[blocks], name not in rule.nonnegative)
            state[name] = wide

