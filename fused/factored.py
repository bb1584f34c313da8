"""Second moments kept by rows and columns: which dimensions, in which layout, and the rule's description."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .rules import Hyper, Rule

ROW_VAR, COL_VAR, VARIANCE = "row_var", "col_var", "variance"

HYPERS: tuple[Hyper, ...] = (
    ("lr", -1),
    ("beta2_decay", -1),
    ("eps", 0),
    ("eps", 1),
    ("d", -1),
    ("weight_decay", -1),
    ("beta1", -1),
    ("beta2_cap", -1),
)
"""Hyperparameters in the order of ``Adafactor::Hyper`` in ``csrc/adafactor.h``."""

DECAY_SCALES = ("lr", "step", "none")
EPS1_MODES = ("clamp", "add")
MOMENTS_OF = ("step", "update")
FACTORED_DIMS = ("last", "largest")
RULE_OPTIONS = (
    "relative_step", "warmup_init", "scale_parameter", "eps1_mode", "decay_scale", "moment_of",
    "beta1", "factored_dims", "min_dim_size_to_factor",
)
"""Options of a parameter group that :func:`rule_of` reads."""


class Flag(IntFlag):
    """Variants, numbered as ``Adafactor::Flag`` in ``csrc/adafactor.h``, where they are explained."""

    RELATIVE_STEP = 1
    WARMUP = 2
    SCALE_PARAMETER = 4
    ADD_EPS = 8
    DECAY_BY_STEP = 16
    DECAY_PLAIN = 32
    MOMENT_OF_UPDATE = 64


@dataclass(frozen=True)
class FactoredRule(Rule):
    """Adafactor's rule for one parameter group; ``states`` are the elementwise ones.

    Attributes:
        flags: the variant, as :class:`Flag`.
        dims: ``"last"`` or ``"largest"``.
        least_dim: smallest size of a dimension that is factored.
    """

    flags: int = 0
    dims: str = "last"
    least_dim: int = 0

    @property
    def index(self) -> int:
        """The only rule of its tables."""
        return 0


def rule_of(group: dict[str, Any]) -> FactoredRule:
    """The rule of a parameter group."""
    flags = (
        Flag.RELATIVE_STEP * bool(group["relative_step"])
        | Flag.WARMUP * bool(group["warmup_init"])
        | Flag.SCALE_PARAMETER * bool(group["scale_parameter"])
        | Flag.ADD_EPS * (group["eps1_mode"] == "add")
        | Flag.DECAY_BY_STEP * (group["decay_scale"] == "step")
        | Flag.DECAY_PLAIN * (group["decay_scale"] == "none")
        | Flag.MOMENT_OF_UPDATE * (group["moment_of"] == "update")
    )
    return _rule(group["beta1"] is not None, int(flags), group["factored_dims"], int(group["min_dim_size_to_factor"]))


@cache
def _rule(moment: bool, flags: int, dims: str, least_dim: int) -> FactoredRule:
    states = ("exp_avg",) if moment else ()
    return FactoredRule("adafactor", states, HYPERS, flags=flags, dims=dims, least_dim=least_dim)


@dataclass(frozen=True)
class Matrices:
    """A tensor seen as ``lead`` matrices of ``rows`` x ``cols``; ``order`` puts its dimensions so."""

    order: tuple[int, ...]
    lead: int
    rows: int
    cols: int

    def var_shape(self, shape: Sequence[int], name: str) -> list[int]:
        """Shape of ``row_var`` or ``col_var`` beside a tensor of ``shape``, with the averaged dimension kept as 1."""
        averaged = self.order[-1] if name == ROW_VAR else self.order[-2]
        return [1 if dim == averaged else size for dim, size in enumerate(shape)]

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of ``shape`` whose memory holds its matrices one after the other, by rows."""
        in_order = torch.empty([shape[dim] for dim in self.order], dtype=dtype, device=device)
        return in_order.permute(_inverse(self.order))


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def matrices_of(shape: Sequence[int], rule: FactoredRule) -> Matrices | None:
    """How a tensor of ``shape`` is factored; None: it is not, its second moment has its own shape."""
    ndim = len(shape)
    if ndim < 2:
        return None
    pair = (ndim - 2, ndim - 1)
    if rule.dims == "largest":
        first, second = sorted(range(ndim), key=shape.__getitem__)[-2:]
        pair = (min(first, second), max(first, second))
    if min(shape[pair[0]], shape[pair[1]]) < rule.least_dim:
        return None
    others = [dim for dim in range(ndim) if dim not in pair]
    lead = 1
    for dim in others:
        lead *= shape[dim]
    return Matrices((*others, *pair), lead, shape[pair[0]], shape[pair[1]])


def var_dtype(param: Tensor) -> torch.dtype:
    """Dtype of the second moment: the arithmetic's. Low precision would save nothing beside a factored parameter."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _wanted(rule: FactoredRule, param: Tensor) -> dict[str, list[int]]:
    """Shapes of the second moment by key."""
    matrices = matrices_of(param.shape, rule)
    if matrices is None:
        return {VARIANCE: list(param.shape)}
    return {key: matrices.var_shape(param.shape, key) for key in (ROW_VAR, COL_VAR)}


def check_state(rule: FactoredRule, param: Tensor, state: dict[str, Any], name: str) -> None:
    """Raises ValueError where a second moment does not fit the parameter; the message calls it by ``name``."""
    wanted = _wanted(rule, param)
    for key in (ROW_VAR, COL_VAR, VARIANCE):
        value = state.get(key)
        if value is not None and (key not in wanted or list(value.shape) != wanted[key]):
            raise ValueError(
                f"state '{key}' of shape {tuple(value.shape)} does not fit {name}, whose second moment has "
                + " and ".join(f"'{k}' of shape {tuple(shape)}" for k, shape in wanted.items())
                + f" with factored_dims={rule.dims!r}, min_dim_size_to_factor={rule.least_dim}"
            )


def complete_state(rule: FactoredRule, param: Tensor, state: dict[str, Any], name: str) -> None:
    """Creates the second moment that ``state`` lacks, and brings one that was loaded into the arithmetic's dtype.

    Raises:
        ValueError: as :func:`check_state`.
        RuntimeError: a second moment is on another device.
    """
    check_state(rule, param, state, name)
    matrices, wanted = matrices_of(param.shape, rule), _wanted(rule, param)
    dtype = var_dtype(param)
    for key, shape in wanted.items():
        value = state.get(key)
        if value is not None:
            if value.device != param.device:
                raise RuntimeError(f"state '{key}' of {name} is on {value.device}, its parameter on {param.device}")
            state[key] = value if value.dtype == dtype else value.to(dtype)
        elif matrices is None:
            state[key] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
        else:
            state[key] = matrices.empty(shape, dtype, param.device).zero_()
