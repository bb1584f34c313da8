"""Compiling the kernels for a named architecture, on any machine: to look at the machine code, or to have it ready."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import CHUNK, NUM_WARPS, Formats, kernels
from .rules import RULES


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
    types = {
        "rows": "*i64",
        "chunk_rows": "*i64",
        "chunk_starts": "*i64",
        "constants": "*fp64",
        "factors": "*fp64",
        "steps": "*fp64",
        "skip": "*i32",
        "seed": "i64",
    }
    return _compile(kernels.update, types, constants, capability)


def compile_prologue(rule: str, capability: int) -> Any:
    """The prologue of one rule, with a norm, clipping and a loss scale; as :func:`compile_update`."""
    flags = ("NORM", "SCALE", "FOUND_INF", "GRAD_NORM", "SKIPPED", "UNSCALE")
    constants = {
        "CONSTANTS": RULES[rule][0],
        **{f"HAS_{flag}": True for flag in flags},
        "NORM_IS_MAX": False,
        "SKIP_NONFINITE": True,
        "CLIP": True,
        "BLOCK": 128,
    }
    doubles = ("constants", "factors", "steps", "norm_total", "unscale", "grad_multiplier", "max_norm")
    types = {
        **dict.fromkeys(("rows", "members", "groups"), "*i64"),
        "count": "i32",
        "skip": "*i32",
        **dict.fromkeys(doubles, "*fp64"),
        **dict.fromkeys(("grad_scale", "found_inf", "grad_norm", "skipped"), "*fp32"),
    }
    return _compile(kernels.prologue, types, constants, capability)


def compile_reduce(grad_format: int, maximum: bool, capability: int) -> Any:
    """The read of gradients of one format; as :func:`compile_update`."""
    constants = {"MAXIMUM": maximum, "GRAD_FORMAT": grad_format, "BLOCK": CHUNK, "LANES": 1024}
    types = {
        **dict.fromkeys(("rows", "chunk_rows", "chunk_starts"), "*i64"),
        **dict.fromkeys(("first", "row_count", "live_rows"), "i32"),
        **dict.fromkeys(("partials", "row_values", "total"), "*fp64"),
        "counters": "*i32",
    }
    return _compile(kernels.reduce, types, constants, capability)


def _compile(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> Any:
    ordered = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    source = ASTSource(kernel, ordered, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
