"""Norms and clipping of gradients outside an optimizer: torch.nn.utils' functions over the whole model at once.

An optimizer's own ``max_grad_norm`` is cheaper still: it applies the factor during the update.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import sharding
from .backends import extension
from .precision import FORMAT_OF_DTYPE, widest_float
from .state import local, real

Tensors = Tensor | Iterable[Tensor]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Scales gradients in place so that their norm, all seen as one vector, is at most ``max_norm``.

    .. math::
        g \leftarrow g \cdot \min\!\left(1, \frac{\text{max\_norm}}{\lVert g \rVert + 10^{-6}}\right)

    Args:
        parameters: a parameter or several; those without a gradient are passed over. Gradients of any shapes, strides,
            floating or complex dtypes and devices, mixed freely; DTensors count with all their shards.
        max_norm: largest norm; infinite: measure only.
        norm_type: 2.0 and ``inf`` take one read; any other order goes through torch operations.
        error_if_nonfinite: raise where the norm is infinite or NaN, before anything is changed. Waits for the device.
        foreach: accepted for torch's sake; chooses nothing.

    Returns:
        The norm before clipping, without dimensions, on the device of the first gradient; float64 where a gradient is,
        else float32.

    Numerics:
        Squares are summed in float64 in a fixed order: float16 does not overflow, and the result is the same to the bit
        for any number of threads. Where nothing is to be clipped nothing is written on the CPU.

    Raises:
        RuntimeError: a gradient is sparse, or the norm is not finite and ``error_if_nonfinite`` is set.
        TypeError, ValueError: an argument is no number; the message has its name and value.

    Example:
        >>> loss.backward()
        >>> norm = fused.clip_grad_norm_(model.parameters(), 1.0)
        >>> optimizer.step()

    Reference:
        Pascanu et al., "On the difficulty of training recurrent neural networks", arXiv:1211.5063, Algorithm 1.
    """
    max_norm = _number("max_norm", max_norm)
    grads = Gradients(_as_list(parameters), of_params=True)
    norm = grads.norm(norm_type, error_if_nonfinite)
    grads.clip(norm, max_norm)
    return grads.returned(norm)


@torch.no_grad()
def get_total_norm(
    tensors: Tensors, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> Tensor:
    r"""Norm of tensors, all seen as one vector.

    .. math::
        \lVert (g_1, g_2, \dots) \rVert

    Args:
        tensors: a tensor or several, as the gradients of :func:`clip_grad_norm_`.
        norm_type: order of the norm; see :func:`clip_grad_norm_`.
        error_if_nonfinite: raise where the norm is infinite or NaN. Waits for the device.
        foreach: accepted for torch's sake; chooses nothing.

    Returns:
        The norm; see :func:`clip_grad_norm_`.

    Numerics:
        As :func:`clip_grad_norm_`.

    Raises:
        RuntimeError: a tensor is sparse, or the norm is not finite and ``error_if_nonfinite`` is set.
        TypeError, ValueError: ``norm_type`` is no number; the message has its value.

    Example:
        >>> norm = fused.get_total_norm([p.grad for p in model.parameters()])
    """
    grads = Gradients(_as_list(tensors), of_params=False)
    return grads.returned(grads.norm(norm_type, error_if_nonfinite))


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Tensors, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    r"""Scales gradients in place by the factor that a norm known already asks for.

    .. math::
        g \leftarrow g \cdot \min\!\left(1, \frac{\text{max\_norm}}{\text{total\_norm} + 10^{-6}}\right)

    Args:
        parameters: as :func:`clip_grad_norm_`.
        max_norm: largest norm; infinite: nothing is done.
        total_norm: the norm, one element, as :func:`get_total_norm` or torch's functions give it (a DTensor too).
        foreach: accepted for torch's sake; chooses nothing.

    Raises:
        RuntimeError: a gradient is sparse.
        TypeError, ValueError: an argument is no number; the message has its name and value.

    Example:
        >>> norm = fused.get_total_norm([p.grad for p in model.parameters()])
        >>> fused.clip_grads_with_norm_(model.parameters(), 1.0, norm)
    """
    max_norm = _number("max_norm", max_norm)
    if isinstance(total_norm, Tensor) and total_norm.numel() != 1:
        raise ValueError(f"total_norm must be one number, got a tensor of shape {tuple(total_norm.shape)}")
    whole = getattr(total_norm, "full_tensor", None)
    Gradients(_as_list(parameters), of_params=True).clip(total_norm if whole is None else whole(), max_norm)


@torch.no_grad()
def clip_grad_value_(parameters: Tensors, clip_value: float, foreach: bool | None = None) -> None:
    r"""Clamps every element of the gradients, in place, to ``[-clip_value, clip_value]``.

    .. math::
        g \leftarrow \min(\max(g, -c), c)

    Args:
        parameters: as :func:`clip_grad_norm_`; complex gradients have no order.
        clip_value: largest magnitude.
        foreach: accepted for torch's sake; chooses nothing.

    Numerics:
        NaN stays NaN.

    Raises:
        RuntimeError: a gradient is sparse or complex.
        TypeError, ValueError: ``clip_value`` is no number, or NaN; the message has its value.

    Example:
        >>> fused.clip_grad_value_(model.parameters(), 0.5)
    """
    clip_value = _number("clip_value", clip_value)
    if math.isnan(clip_value):
        raise ValueError("clip_value must be a number, got nan")
    Gradients(_as_list(parameters), of_params=True).clamp(clip_value)


def _number(name: str, value: Any) -> float:
    """What torch's functions take for a number: strings that say one too, as "inf"."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} must be a number, got {value!r} of type {type(value).__name__}") from None


def _as_list(tensors: Tensors) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    listed = list(tensors)
    if not listed and isinstance(tensors, types.GeneratorType):
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    return listed


class Gradients:
    """The gradients of one call: those the CPU kernels take as they lie in memory, and the rest.

    Args:
        items: the gradients; with ``of_params`` parameters, of which those without a gradient are passed over.
        of_params: see ``items``.

    Raises:
        RuntimeError: a gradient is sparse, or neither floating nor complex.
    """

    def __init__(self, items: list[Tensor], of_params: bool) -> None:
        self.items, self.of_params = items, of_params
        self.rows: Any = None
        self.taken: list[Tensor] = []
        if extension is not None and not torch.compiler.is_compiling():
            self.rows = extension.GradientRows(items, of_params)
            self.taken, self.rest = self.rows.tensors, self.rows.rest
            if len(set(map(id, self.taken))) != len(self.taken):  # all rows are written to at once
                once, again = _first_and_further(self.taken)
                self.rows = extension.GradientRows(once, False)
                self.taken, self.rest = self.rows.tensors, [*self.rest, *again]
        else:
            self.rest = [g for g in ([p.grad for p in items] if of_params else items) if g is not None]
        for grad in self.rest:
            if grad.layout != torch.strided:
                raise RuntimeError(f"{_called(grad)} has layout {grad.layout}: sparse gradients have no norm here")
            if grad.dtype not in FORMAT_OF_DTYPE:
                raise RuntimeError(f"{_called(grad)} has dtype {grad.dtype}: use a floating or complex one")

    # ---- the norm ----

    def norm(self, norm_type: float, error_if_nonfinite: bool = False) -> float | Tensor:
        """In float64: a number where nothing but CPU kernels take part, else on the device of a gradient."""
        norm_type = _number("norm_type", norm_type)
        maximum = norm_type == float("inf")
        if norm_type not in (2.0, float("inf")) or (maximum and any(g.is_complex() for g in [*self.taken, *self.rest])):
            norm: float | Tensor = self._norm_of_order(norm_type)
        elif self.rest or self.rows is None:
            value = self._total(maximum)[0]
            norm = value if maximum else value.sqrt()
        else:
            number: float = extension.norm_total_cpu(self.rows, maximum)[0]
            norm = number if maximum else math.sqrt(number)
        if error_if_nonfinite and not math.isfinite(norm):
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
                "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
                "`error_if_nonfinite=False`"
            )
        return norm

    def _total(self, maximum: bool) -> Tensor:
        """Float64 ``(sum of squares or largest magnitude, number of nonfinite tensors)`` over all shards."""
        total = _sum_on_cpu(self.rows, maximum) if self.taken else None
        for groups, tensors in self._divided():
            part = _sum(tensors, maximum)
            sharding.all_reduce(part, groups, maximum)
            total = part if total is None else _add(total, part, maximum)
        return torch.zeros(2, dtype=torch.float64, device="cpu") if total is None else total

    def _divided(self) -> list[tuple[tuple[Any, ...], list[Tensor]]]:
        """The rest, by the processes that hold the other shards, as this process's parts."""
        found: dict[tuple[Any, ...], list[Tensor]] = {}
        for grad in self.rest:
            found.setdefault(sharding.shard_groups(grad), []).append(local(grad))
        return list(found.items())

    def _norm_of_order(self, norm_type: float) -> Tensor:
        parts = [grad for grad in [*self.taken, *self.rest] if local(grad).numel() != 0]
        if any(sharding.shard_groups(grad) for grad in parts):
            raise RuntimeError(f"a norm of order {norm_type} over shards is not there: use norm_type 2.0 or inf")
        device = parts[0].device if parts else torch.device("cpu")
        norms = [torch.linalg.vector_norm(_wide(local(grad)), norm_type).to(device) for grad in parts]
        if not norms:
            return torch.zeros((), dtype=torch.float64, device="cpu")
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        return total

    def returned(self, norm: float | Tensor) -> Tensor:
        """The norm as the functions return it."""
        double = any(grad.dtype in (torch.float64, torch.complex128) for grad in self.rest)
        if self.rows is not None:
            double = double or self.rows.has_float64
        dtype = torch.float64 if double else torch.float32
        if isinstance(norm, float):
            return torch.tensor(norm, dtype=dtype, device="cpu")
        return norm.to(self.first_device(), dtype)

    def first_device(self) -> torch.device:
        """Of the first tensor that takes part."""
        if not self.rest or not self.taken:
            return local(self.rest[0]).device if self.rest else torch.device("cpu")
        parts = {id(tensor) for tensor in [*self.taken, *self.rest]}
        grads = (tensor.grad if self.of_params else tensor for tensor in self.items)
        return next(local(grad).device for grad in grads if grad is not None and id(grad) in parts)

    # ---- in place ----

    def clip(self, norm: float | Tensor, max_norm: float) -> None:
        """Scales all of them by what takes ``norm`` to at most ``max_norm``."""
        if max_norm == float("inf"):
            return
        if self.taken:
            factor = extension.clip_factor(float(norm), max_norm)
            if factor != 1.0:
                self.scale_taken(factor)
        if self.rest:
            wide = norm if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64, device="cpu")
            wide = wide.to(widest_float(wide.device))
            self.scale_rest((max_norm / (wide + 1e-6)).clamp(max=1.0))

    def scale(self, factor: float) -> None:
        """Multiplies all of them by a number."""
        if self.taken:
            self.scale_taken(factor)
        for tensors in _by_place(self.rest).values():
            torch._foreach_mul_(tensors, factor)

    def scale_taken(self, factor: float) -> bool:
        """Multiplies what the kernels take; whether an element was not finite."""
        nonfinite: bool = extension.scale_cpu(self.rows, factor)
        increment_version(self.taken)
        return nonfinite

    def scale_rest(self, factor: Tensor) -> None:
        """Multiplies the rest."""
        for (device, dtype), tensors in _by_place(self.rest).items():
            there = factor.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
            if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
                # A factor of another dtype would be multiplied tensor by tensor, one of theirs is rounded to 8 bits.
                torch._amp_foreach_non_finite_check_and_unscale_(tensors, torch.zeros_like(there), there)
            else:
                torch._foreach_mul_(tensors, there)

    def unscale(self, factor: Tensor) -> dict[torch.device, Tensor]:
        """Multiplies all of them by ``factor`` (float32); per device, 1 where an element was not finite, else 0."""
        found: dict[torch.device, Tensor] = {}
        if self.taken:
            nonfinite = float(self.scale_taken(factor.item()))
            found[torch.device("cpu")] = torch.tensor(nonfinite, dtype=torch.float32, device="cpu")
        for groups, tensors in self._divided():
            for (device, _), alike in _by_place(tensors).items():
                flag = torch.zeros((), dtype=torch.float32, device=device)
                torch._amp_foreach_non_finite_check_and_unscale_(alike, flag, factor.to(device))
                sharding.all_reduce(flag, groups, maximum=True)
                found[device] = torch.maximum(found[device], flag) if device in found else flag
        return found

    def clamp(self, limit: float) -> None:
        """Brings every element into ``[-limit, limit]``."""
        for grad in [*self.taken, *self.rest]:
            if grad.is_complex():
                raise RuntimeError(f"{_called(grad)} is {grad.dtype}: complex numbers have no order")
        if self.taken:
            extension.clamp_cpu(self.rows, limit)
            increment_version(self.taken)
        for grad in self.rest:
            sharding.shard_groups(grad)  # refuses summands
        for tensors in _by_place(self.rest).values():
            torch._foreach_clamp_min_(tensors, -limit)
            torch._foreach_clamp_max_(tensors, limit)


def _first_and_further(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Every tensor once, and the tensors of every further time."""
    once: list[Tensor] = []
    again: list[Tensor] = []
    seen: set[int] = set()
    for tensor in tensors:
        (again if id(tensor) in seen else once).append(tensor)
        seen.add(id(tensor))
    return once, again


def _sum_on_cpu(rows: Any, maximum: bool) -> Tensor:
    return torch.tensor(extension.norm_total_cpu(rows, maximum), dtype=torch.float64, device="cpu")


def _sum(tensors: list[Tensor], maximum: bool) -> Tensor:
    """Total of this process's tensors, of any device and layout, on the device of the first."""
    total: Tensor | None = None
    for (device, _), alike in _by_place(tensors).items():
        if device.type == "cpu" and extension is not None and not torch.compiler.is_compiling():
            rows = extension.GradientRows([tensor.contiguous() for tensor in alike], False)
            part = _sum_on_cpu(rows, maximum)
            if rows.rest:  # of classes of their own, which only torch operations know how to read
                part = _add(part, _sum_in_torch(rows.rest, maximum), maximum)
        else:
            part = _sum_in_torch(alike, maximum)
        total = part if total is None else _add(total, part, maximum)
    assert total is not None
    return total


def _sum_in_torch(tensors: list[Tensor], maximum: bool) -> Tensor:
    """With as many calls however many tensors: to launch a kernel takes longer than to read a small one."""
    wide = widest_float(tensors[0].device)
    there = [tensor for tensor in tensors if tensor.numel() != 0]
    if not there:
        return torch.zeros(2, dtype=wide, device=tensors[0].device)
    stacked = torch.stack(torch._foreach_norm(there, float("inf") if maximum else 2.0, dtype=wide))
    value = stacked.amax() if maximum else stacked.square().sum()
    return torch.stack((value, (~stacked.isfinite()).sum().to(wide)))


def _called(grad: Tensor) -> str:
    return f"a gradient of shape {tuple(grad.shape)}"


def _add(total: Tensor, part: Tensor, maximum: bool) -> Tensor:
    part = part.to(total.device, total.dtype)
    return torch.maximum(total, part) if maximum else total + part


def _by_place(tensors: list[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """This process's parts as their reals lie in memory, by device and dtype.

    The signs that a conjugated or negated view puts before some of them change no norm, and no scaling or clamping.
    """
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        part = local(tensor)
        part = part.conj() if part.is_conj() else part
        part = real(torch._neg_view(part) if part.is_neg() else part)
        found.setdefault((part.device, part.dtype), []).append(part)
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else widest_float(tensor.device))
