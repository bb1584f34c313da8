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
    source = ASTSource(kernels.update, {**types, **dict.fromkeys(constants, "constexpr")}, constants)
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
