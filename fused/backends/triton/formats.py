"""Storage formats <-> float32 in registers: the twin of ``csrc/formats.h``, bit for bit.

Rounding is done on integers: Triton's interpreter truncates its own float32 -> bfloat16 cast, the GPU rounds; integer
operations are the same in both. Patterns are uint32.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _float(u):
    return u.to(tl.float32, bitcast=True)


@triton.jit
def bf16_to_float(h):
    return _float(h.to(tl.uint32) << 16)


@triton.jit
def float_to_bf16(x):
    u = _bits(x)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    return tl.where((u & MAGNITUDE) > INFINITY, 0x7FC0, rounded).to(tl.uint16)


@triton.jit
def float_to_bf16_stochastic(x, random):
    u = _bits(x)
    rounded = (u + (random >> 16)) >> 16
    special = tl.where((u & MAGNITUDE) > INFINITY, 0x7FC0, u >> 16)
    return tl.where((u & MAGNITUDE) >= INFINITY, special, rounded).to(tl.uint16)


@triton.jit
def fp16_to_float(h):
    wide = h.to(tl.uint32)
    magnitude = wide & 0x7FFF
    normal = (magnitude << 13) + (112 << 23)
    special = (magnitude << 13) | INFINITY
    denormal = _bits(magnitude.to(tl.int32).to(tl.float32) * 0.000000059604644775390625)  # 2^-24
    u = tl.where(magnitude < 0x400, denormal, tl.where(magnitude >= 0x7C00, special, normal))
    return _float(u | ((wide & 0x8000) << 16))


@triton.jit
def float_to_fp16(x):
    u = _bits(x)
    a = u & MAGNITUDE
    special = tl.where(a > INFINITY, 0x7E00, 0x7C00).to(tl.uint32)
    denormal = _bits(_float(a) + 0.5) - 0x3F000000
    normal = (a - (112 << 23) + 0xFFF + ((a >> 13) & 1)) >> 13
    h = tl.where(a >= 0x47800000, special, tl.where(a < 0x38800000, denormal, normal))
    return (h | ((u >> 16) & 0x8000)).to(tl.uint16)


@triton.jit
def float_to_fp16_stochastic(x, random):
    u = _bits(x)
    a = u & MAGNITUDE
    special = tl.where(a > INFINITY, 0x7E00, 0x7C00).to(tl.uint32)
    scaled = tl.where(a < 0x38800000, _float(a), 0.0) * 16777216.0
    whole = scaled.to(tl.int32)
    up = (random >> 8).to(tl.int32).to(tl.float32) * 0.000000059604644775390625 < scaled - whole.to(tl.float32)
    normal = (a - (112 << 23) + (random >> 19)) >> 13
    below = whole.to(tl.uint32) + up.to(tl.uint32)
    h = tl.where(a >= 0x47800000, special, tl.where(a < 0x38800000, below, normal))
    return (h | ((u >> 16) & 0x8000)).to(tl.uint16)
