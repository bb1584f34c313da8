"""Adafactor in plain torch: the executable specification of ``csrc/adafactor.h``, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import state as state_storage
from ..adafactor import check_supported
from ..factored import COL_VAR, ROW_VAR, VARIANCE, FactoredRule, Flag, matrices_of
from ..optimizer import parameter_name
from ..precision import Storage, widest_float
from ..state import local
from . import reference
from .reference import Number

Hypers = dict[str, Any]


def second_moment(
    g: Tensor, variances: list[Tensor], h: Hypers, flags: Flag, step: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The inverse root of the second moment of ``g``, and the new variances.

    Args:
        g: gradients, with rows and columns as the last two dimensions where they are factored.
        variances: ``[row_var, col_var]`` or ``[variance]``, in the dimensions of ``g``.
        h: the parameter group.
        flags: the variant.
        step: count including this one.
    """
    eps1 = h["eps"][0]
    if eps1 is None:
        eps1 = torch.finfo(g.dtype).eps
    adds = bool(flags & Flag.ADD_EPS)
    weight = (step ** h["beta2_decay"]).clamp(min=1.0 - h["beta2_cap"]).to(g.dtype)
    square = g * g + eps1 if adds else g * g
    if len(variances) == 1:
        new = [torch.lerp(variances[0], square, weight)]
        root = new[0].rsqrt()
    else:
        means = (square.mean(-1, keepdim=True), square.mean(-2, keepdim=True))
        new = [torch.lerp(old, mean, weight) for old, mean in zip(variances, means, strict=True)]
        mean = new[0].mean(-2, keepdim=True)
        mean = mean if adds else mean.clamp(min=eps1)
        # An empty row has an infinite root, even over an empty mean.
        root = torch.where(new[0] == 0, torch.inf, (mean / new[0]).sqrt()) * new[1].rsqrt()
    largest = torch.finfo(g.dtype).max
    limit = largest if adds or eps1 == 0 else min(1.0 / eps1, largest)
    return root.clamp(max=limit), new


def step_size(p: Tensor, h: Hypers, flags: Flag, step: Tensor) -> Tensor:
    """The step size of a tensor."""
    rho = torch.as_tensor(h["lr"], dtype=step.dtype, device=step.device)
    if flags & Flag.RELATIVE_STEP:
        rho = torch.minimum(rho, step.rsqrt())
    if flags & Flag.WARMUP:
        rho = torch.minimum(rho, 1e-6 * step)
    return rho * _rms(p, step.dtype).clamp(min=h["eps"][1]) if flags & Flag.SCALE_PARAMETER else rho


def adafactor(
    p: Tensor, g: Tensor, variances: list[Tensor], moment: Tensor | None, h: Hypers, flags: Flag, step: Tensor
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Adafactor (arXiv:1804.04235): new parameter, variances and first moment. ``step`` is in the widest arithmetic."""
    root, variances = second_moment(g, variances, h, flags, step)
    update = g * root
    if h["d"] is not None:
        update = update / (_rms(update, step.dtype) / h["d"]).clamp(min=1.0).to(update.dtype)
    size = step_size(p, h, flags, step)
    decay_scale = 1.0 if flags & Flag.DECAY_PLAIN else size if flags & Flag.DECAY_BY_STEP else h["lr"]
    decayed = p * _like(1.0 - decay_scale * h["weight_decay"], p)
    if moment is None:
        return decayed - _like(size, p) * update, variances, None
    beta1 = h["beta1"]
    if flags & Flag.MOMENT_OF_UPDATE:
        moment = beta1 * moment + (1.0 - beta1) * update
        return decayed - _like(size, p) * moment, variances, moment
    moment = beta1 * moment + (1.0 - beta1) * _like(size, p) * update
    return decayed - moment, variances, moment


def _rms(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).square().mean().sqrt() if x.numel() else torch.zeros((), dtype=dtype, device=x.device)


def _like(value: Number, p: Tensor) -> Number:
    return value.to(p.dtype) if isinstance(value, Tensor) else value


class Batch(reference.Batch):
    """Parameters updated one by one in torch operations."""

    def _check(self, group: dict[str, Any], i: int, param: Tensor) -> None:
        if param.grad is not None:
            check_supported(param, parameter_name(group, i))
        super()._check(group, i, param)

    def _update_one(
        self, index: int, group: dict[str, Any], param: Tensor, factor: Number, skip: Tensor | None, seed: int
    ) -> None:
        rule = self.optimizer._rule(group)
        assert isinstance(rule, FactoredRule)
        state = state_storage.initialize(self.optimizer, group, param)
        count = reference.next_step(state, skip)
        step = torch.as_tensor(count, dtype=widest_float(param.device), device=param.device)
        operands = reference.Operands(param, state, rule, Storage.of(group), index, seed)
        matrices = matrices_of(param.shape, rule)
        order = tuple(range(param.ndim)) if matrices is None else matrices.order
        names = (VARIANCE,) if matrices is None else (ROW_VAR, COL_VAR)

        p = operands.load_param()
        assert param.grad is not None
        g = local(param.grad).to(p.dtype) * (-factor if group.get("maximize") else factor)
        moment = operands.load_states()[0] if rule.states else None
        new_p, variances, new_moment = adafactor(
            p.permute(order),
            g.permute(order),
            [state[name].permute(order) for name in names],
            None if moment is None else moment.permute(order),
            reference.hypers_of(group, p),
            Flag(rule.flags),
            step,
        )
        for name, value in zip(names, variances, strict=True):
            reference.assign(state[name].permute(order), value, skip)
        back = sorted(range(param.ndim), key=order.__getitem__)
        states = [] if new_moment is None else [_in_memory_as(new_moment, matrices is not None).permute(back)]
        operands.store(_in_memory_as(new_p, matrices is not None).permute(back), states, count, skip)


def _in_memory_as(value: Tensor, in_order: bool) -> Tensor:
    """Random bits are drawn in the order of memory, where the kernels see matrices by rows."""
    return value.contiguous() if in_order else value
