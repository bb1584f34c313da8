"""Storage formats: what parameters, master weights and optimizer state are kept in, and how options name them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK8 = 32
"""Elements that share a scale in an 8-bit state."""


class Format(IntEnum):
    """Storage formats, numbered as in ``csrc/table.h``."""

    NONE = 0
    FLOAT32 = 1
    FLOAT64 = 2
    BFLOAT16 = 3
    FLOAT16 = 4
    REMAINDER16 = 5
    REMAINDER8 = 6
    BLOCK8_SIGNED = 7
    BLOCK8_UNSIGNED = 8


FORMAT_OF_DTYPE = {
    torch.float32: Format.FLOAT32,
    torch.float64: Format.FLOAT64,
    torch.bfloat16: Format.BFLOAT16,
    torch.float16: Format.FLOAT16,
    torch.complex64: Format.FLOAT32,
    torch.complex128: Format.FLOAT64,
    torch.complex32: Format.FLOAT16,
}

STATE_DTYPES = ("float32", "bfloat16", "float16", "int8")
MASTER_WEIGHTS = ("fp32", "split", "split8")
GROUP_OPTIONS = ("master_weights", "state_dtype", "stochastic_rounding")
"""Options of the engine that may differ between parameter groups: those of :class:`Storage`."""

REMAINDER_DTYPE = {"split": torch.int16, "split8": torch.int8}


def parse_state_dtype(value: object) -> str | None:
    """Returns ``state_dtype`` as one of ``STATE_DTYPES``, or None for the default."""
    name = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    if name is None:
        return None
    if name not in STATE_DTYPES:
        raise ValueError(
            f"Invalid state_dtype value: {value!r}. Use torch.float32, torch.bfloat16, torch.float16, 'int8', "
            "or None for the parameter's own (float32 beside master weights)"
        )
    return str(name)


def parse_master_weights(value: Any) -> str | None:
    """Returns ``master_weights`` checked."""
    if value is not None and value not in MASTER_WEIGHTS:
        raise ValueError(f"Invalid master_weights value: {value!r}. Use None, 'fp32', 'split' or 'split8'")
    return None if value is None else str(value)


@dataclass(frozen=True)
class Storage:
    """How one parameter group keeps its parameters' masters and its state.

    Attributes:
        master_weights: None, ``"fp32"``, ``"split"`` or ``"split8"``.
        state_dtype: one of ``STATE_DTYPES``; None: the parameter's dtype, float32 beside master weights.
        stochastic_rounding: whether stores to a lower precision round stochastically.
    """

    master_weights: str | None = None
    state_dtype: str | None = None
    stochastic_rounding: bool = False

    @staticmethod
    def of(group: dict[str, object]) -> Storage:
        """Reads the storage options of a parameter group."""
        return _storage(group.get("master_weights"), group.get("state_dtype"), group.get("stochastic_rounding", False))

    def check(self, param: Tensor, name: str) -> None:
        """Raises where the options do not fit a parameter's dtype."""
        low = param.dtype in (torch.bfloat16, torch.float16)
        if self.master_weights is not None and not low:
            raise ValueError(
                f"master_weights={self.master_weights!r} needs bfloat16 or float16 parameters, but {name} is "
                f"{param.dtype}: it is its own master, use master_weights=None for its group"
            )
        if self.state_dtype is not None and param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"state_dtype={self.state_dtype!r} needs float32, bfloat16 or float16 parameters, but {name} is "
                f"{param.dtype}: use state_dtype=None for its group, which keeps its state in the parameter's dtype"
            )

    def dtype_of_state(self, param: Tensor) -> torch.dtype:
        """Dtype of a state tensor (``torch.uint8`` for 8-bit codes)."""
        if self.state_dtype == "int8":
            return torch.uint8
        if self.state_dtype is not None:
            return getattr(torch, self.state_dtype)  # type: ignore[no-any-return]
        return torch.float32 if self.master_weights is not None else param.dtype


@cache
def _storage(master_weights: object, state_dtype: object, stochastic_rounding: object) -> Storage:
    """One object for equal options: every step asks for every group's, and hundreds of groups must cost nothing."""
    return Storage(parse_master_weights(master_weights), parse_state_dtype(state_dtype), bool(stochastic_rounding))


def widest_float(device: torch.device) -> torch.dtype:
    """float64, in which norms are summed and a step's constants derived; float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def blocks8(numel: int) -> int:
    """Number of 8-bit blocks, and so of scales, of a tensor."""
    return -(-numel // BLOCK8)
