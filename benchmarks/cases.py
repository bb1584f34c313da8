"""What is measured: the optimizers and the storage formats. One row here is one row in every subcommand.

The hyperparameters are chosen to make mistakes visible to the correctness gate (large steps, large weight decay), not
to train well; they do not change the speed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
MASTER_BYTES: dict[str | None, float] = {None: 0, "fp32": 4, "split": 2, "split8": 1}
INT8_BYTES = 1.0625  # one code and its share of two 16-bit scales per block of 64


@dataclass(frozen=True)
class Case:
    """One optimizer with fixed hyperparameters, as `torch.optim` spells them."""

    key: str
    cls: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    moments: tuple[str, ...] = ()  # state tensors of one number per element
    torch_forms: tuple[str, ...] = ("foreach", "loop")
    elementwise: bool = True

    def __str__(self) -> str:
        return self.key


_ADAM: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1.0}
_FUSED = ("fused", "foreach", "loop")

CASES: dict[str, Case] = {
    case.key: case
    for case in (
        Case("adamw", "AdamW", _ADAM, ("exp_avg", "exp_avg_sq"), _FUSED),
        Case("adamw-amsgrad", "AdamW", {**_ADAM, "amsgrad": True}, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), _FUSED),
        Case("adam", "Adam", _ADAM, ("exp_avg", "exp_avg_sq"), _FUSED),
        Case("lion", "Lion", {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 1.0}, ("exp_avg",)),
        Case("sgd", "SGD", {"lr": 0.01, "momentum": 0.9, "weight_decay": 1.0}, ("momentum_buffer",), _FUSED),
        Case("sgd-plain", "SGD", {"lr": 0.01, "weight_decay": 1.0}, (), _FUSED),
        Case("rmsprop", "RMSprop", {"lr": 1e-3, "alpha": 0.99, "eps": 1e-8, "weight_decay": 1.0}, ("square_avg",)),
        Case(
            "rmsprop-centered",
            "RMSprop",
            {"lr": 1e-3, "alpha": 0.99, "eps": 1e-8, "weight_decay": 1.0, "momentum": 0.9, "centered": True},
            ("square_avg", "grad_avg", "momentum_buffer"),
        ),
        Case("adagrad", "Adagrad", {"lr": 0.01, "weight_decay": 1.0, "eps": 1e-10}, ("sum",), _FUSED),
        Case(
            "adadelta",
            "Adadelta",
            {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 1.0},
            ("square_avg", "acc_delta"),
        ),
        # A small eps: adding it (transformers) and bounding by it (torch) come to the same. Not the published 1e-30:
        # torch squares it, which is 0 in float32, and a gradient of 0 in a 1 x 1 convolution then makes a NaN.
        Case("adafactor", "Adafactor", {"lr": 0.1, "eps": (1e-15, 1e-3)}, (), elementwise=False),
    )
}
MAIN = ("adamw", "lion", "sgd", "rmsprop", "adagrad", "adadelta", "adafactor")


def get_cases(names: str) -> list[Case]:
    """Cases from a comma list of keys; 'main' is one of each optimizer, 'all' every row."""
    keys = {"all": list(CASES), "main": list(MAIN)}.get(names) or [k.strip().lower() for k in names.split(",")]
    unknown = [k for k in keys if k not in CASES]
    if unknown:
        raise ValueError(f"no optimizer {', '.join(unknown)}: one of {', '.join(CASES)}")
    return [CASES[k] for k in keys]


@dataclass(frozen=True)
class Precision:
    """How parameters, masters and states are stored. `state=None` is torch's way: the dtype of the parameter (float32
    with masters)."""

    param: str = "fp32"
    master: str | None = None
    state: str | None = None
    stochastic: bool = False

    @property
    def name(self) -> str:
        tail = [self.master or "", f"{self.state} states" if self.state else "", "sr" if self.stochastic else ""]
        return "+".join([self.param, *filter(None, tail)])

    @property
    def file_name(self) -> str:
        return self.name.replace("+", "-").replace(" ", "-")

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.param]

    @property
    def wide(self) -> bool:
        """Whether the result has the quality of float32 weights (masters of some kind, or float32 itself)."""
        return self.param in ("fp32", "fp64") or self.master is not None

    @property
    def state_name(self) -> str:
        return self.state or ("fp32" if self.master else self.param)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of this package's optimizers."""
        out: dict[str, Any] = {}
        if self.master:
            out["master_weights"] = self.master
        if self.state:
            out["state_dtype"] = "int8" if self.state == "int8" else DTYPES[self.state]
        if self.stochastic:
            out["stochastic_rounding"] = True
        return out

    @property
    def state_bytes(self) -> float:
        return INT8_BYTES if self.state_name == "int8" else DTYPES[self.state_name].itemsize

    def tolerance(self, case: Case) -> float:
        """Largest relative error of the summed updates that the correctness gate lets through."""
        if self.state == "int8" or self.param in ("bf16", "fp16"):
            return 0.1  # the parameter's own rounding, at parameters of about 0.1 and steps of about 0.01
        if self.state in ("bf16", "fp16"):
            return 0.01
        if not case.elementwise and self.param == "fp32":
            return 2e-3  # torch's float32 sums over tens of millions of elements
        return 1e-9 if self.param == "fp64" else 2e-4


def held_bytes(case: Case, precision: Precision) -> float:
    """Bytes per parameter kept between steps, by the model; without the gradient and any factored state."""
    return precision.dtype.itemsize + MASTER_BYTES[precision.master] + len(case.moments) * precision.state_bytes


def step_bytes(case: Case, precision: Precision, grad_itemsize: int | None = None) -> float:
    """Least bytes per parameter that one step moves: everything held is read and written once, the gradient read once.

    Adafactor reads the gradient three times and the parameter twice when a matrix does not fit in cache; this counts
    the least, as if it did.
    """
    grad = precision.dtype.itemsize if grad_itemsize is None else grad_itemsize
    return 2 * held_bytes(case, precision) + grad
