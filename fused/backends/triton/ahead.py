"""Compiling the kernels for a named architecture, on any machine: to look at the machine code, or to have it ready."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import CHUNK, Formats, adafactor, kernels, options_of
from .rules import RULES

_POINTERS = {
    **dict.fromkeys(("constants", "factors", "steps", "scalars", "norm_total", "unscale"), "*fp64"),
    **dict.fromkeys(("grad_scale", "found_inf", "grad_norm", "skipped"), "*fp32"),
    **dict.fromkeys(("rows", "members", "groups", "shapes", "tiles", "spans", "chunk_rows", "chunk_starts"), "*i64"),
    **dict.fromkeys(("skip", "counters"), "*i32"),
    **dict.fromkeys(("partials", "row_values", "total"), "*fp64"),
    **dict.fromkeys(("first", "row_count", "live_rows", "count"), "i32"),
    "seed": "i64",
}
"""Types of the kernels' arguments."""


def compile_update(formats: Formats, capability: int) -> Any:
    """The update kernel of one combination of rule and formats.

    Args:
        formats: what the launch is for.
        capability: 80, 90, 100, ...: compute capability of the NVIDIA GPU times ten.

    Returns:
        Triton's compiled kernel; ``asm`` holds its PTX and machine code.
    """
    constants = {
        "RULE": RULES[formats.rule][1],
        "STATES": len(formats.states),
        "PARAM_FORMAT": formats.param,
        "GRAD_FORMAT": formats.grad,
        "MASTER_FORMAT": formats.master,
        "STATE_FORMATS": formats.states,
        "STOCHASTIC": formats.stochastic,
        "BLOCK": CHUNK,
    }
    return _compile(kernels.update, constants, capability)


def compile_prologue(rule: str, capability: int) -> Any:
    """The prologue of one rule, with a norm, clipping and a loss scale; as :func:`compile_update`."""
    constants = {"CONSTANTS": RULES[rule][0], "CONTROL": _control(), "BLOCK": 128}
    return _compile(kernels.prologue, constants, capability)


def compile_reduce(grad_format: int, maximum: bool, capability: int) -> Any:
    """The read of gradients of one format; as :func:`compile_update`."""
    constants = {"MAXIMUM": maximum, "GRAD_FORMAT": grad_format, "BLOCK": CHUNK, "LANES": 1024}
    return _compile(kernels.reduce, constants, capability)


def compile_adafactor(kernel: str, formats: Formats, capability: int) -> Any:
    """One of Adafactor's kernels, ``"stats"``, ``"norm"`` or ``"apply"``; as :func:`compile_update`."""
    constants: dict[str, Any] = {"PARAM_FORMAT": formats.param, "GRAD_FORMAT": formats.grad}
    if kernel != "norm":
        constants["MASTER_FORMAT"] = formats.master
    if kernel == "stats":
        constants["CONTROL"] = _control()
    if kernel == "apply":
        states = {"STATE_FORMATS": formats.states, "STATES": len(formats.states), "STOCHASTIC": formats.stochastic}
        constants.update(states)
    return _compile(getattr(adafactor, kernel), constants, capability)


def _control() -> int:
    """With a norm, clipping, a loss scale and everything that a step may be asked for."""
    named = (
        kernels.HAS_NORM, kernels.HAS_SCALE, kernels.HAS_FOUND_INF, kernels.HAS_GRAD_NORM, kernels.HAS_SKIPPED,
        kernels.HAS_UNSCALE, kernels.SKIP_NONFINITE, kernels.CLIP,
    )  # fmt: skip
    return sum(bit.value for bit in named)


def _compile(kernel: Any, constants: dict[str, Any], capability: int) -> Any:
    ordered = {name: "constexpr" if name in constants else _POINTERS[name] for name in kernel.arg_names}
    options = options_of(kernel, nvidia=True)
    source = ASTSource(kernel, ordered, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
