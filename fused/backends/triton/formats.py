"""Storage formats <-> float32 in registers: the twin of ``csrc/formats.h``, bit for bit.

Rounding is done on integers but to float16: Triton's interpreter truncates its own float32 -> bfloat16 cast, the GPU
rounds; integer operations are the same in both. Patterns are uint32.
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
    return h.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def float_to_fp16(x):
    return x.to(tl.float16).to(tl.uint16, bitcast=True)


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


# ---- a float32 master as a low-precision parameter and a remainder ----


@triton.jit
def split_bf16(master, BITS: tl.constexpr, rounding):
    """(parameter, remainder) patterns; ``rounding`` is added before an 8-bit remainder loses the low 8 bits."""
    u = _bits(master)
    u = tl.where((u & MAGNITUDE) > INFINITY, 0x7FC00000, u)
    if BITS == 8:
        u = tl.where((u & MAGNITUDE) >= INFINITY, u, (u + rounding) & 0xFFFFFF00)
        low = (u >> 8).to(tl.uint8)
    else:
        low = u.to(tl.uint16)
    return ((u + 0x8000) >> 16).to(tl.uint16), low


@triton.jit
def join_bf16(param, remainder, BITS: tl.constexpr):
    wide = param.to(tl.uint32)
    low = remainder.to(tl.uint32)
    rounded_up = low >= (1 << (BITS - 1))
    zero = (wide & 0x7FFF) == 0  # written from outside beside an old remainder: must not borrow, it would decode to NaN
    high = wide - (rounded_up & (zero == 0)).to(tl.uint32)
    return _float((high << 16) | (tl.where(rounded_up & zero, 0, low) << (16 - BITS)))


@triton.jit
def _finite_magnitude(u):
    a = u & MAGNITUDE
    return _float(tl.where(a >= INFINITY, 0, a))


@triton.jit
def split_fp16(master, BITS: tl.constexpr, rounding):
    half = float_to_fp16(master)
    code = half.to(tl.uint32) & 0x7FFF
    wide = _bits(fp16_to_float(half))
    denormal = code < 0x400
    unit = 549755813888.0 if BITS == 16 else 1099511627776.0  # 2^39, 2^40
    difference = tl.where(denormal, _finite_magnitude(_bits(master)) - _finite_magnitude(wide), 0.0) * unit
    fixed = (difference + tl.where(difference < 0.0, -0.5, 0.5)).to(tl.int32)
    normal = (_bits(master) & MAGNITUDE).to(tl.int32) - (wide & MAGNITUDE).to(tl.int32)
    distance = tl.where(code >= 0x7C00, 0, tl.where(denormal, fixed, normal))
    if BITS == 8:
        shift = tl.where(denormal, 8, 5)
        distance = (distance + (rounding.to(tl.int32) >> (8 - shift))) >> shift
        low = tl.minimum(tl.maximum(distance, -128), 127).to(tl.uint8)
    else:
        low = tl.minimum(tl.maximum(distance, -32768), 32767).to(tl.uint16)
    return half, low


@triton.jit
def join_fp16(param, remainder, BITS: tl.constexpr):
    signed = remainder.to(tl.int32)
    signed = tl.where(signed >= (1 << (BITS - 1)), signed - (1 << BITS), signed)
    code = param.to(tl.uint32) & 0x7FFF
    u = _bits(fp16_to_float(param))
    a = u & MAGNITUDE
    denormal = code < 0x400
    unit = 549755813888.0 if BITS == 16 else 4294967296.0  # 2^39, 2^32
    fixed = _float(tl.where(denormal, a, 0)) + signed.to(tl.float32) / unit
    distance = signed if BITS == 16 else signed * 32
    normal = (a.to(tl.int32) + distance).to(tl.uint32)
    joined = tl.where(code >= 0x7C00, a, tl.where(denormal, _bits(fixed), normal))
    return _float((u & 0x80000000) ^ joined)


# ---- random bits for stochastic rounding ----


@triton.jit
def random_bits(seed, element, stream, operand, step):
    """32 random bits per element: word i % 4 of Philox counter i / 4, as ``csrc/formats.h`` has it."""
    counter = element // 4
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = (stream * 8 + operand).to(tl.uint32) + 0 * c0
    c3 = step.to(tl.uint32) + 0 * c0
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        m0 = c0.to(tl.uint64) * 0xD2511F53
        m1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (m1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = m1.to(tl.uint32)
        c2 = (m0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = m0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    word = element % 4
    return tl.where(word == 0, c0, tl.where(word == 1, c1, tl.where(word == 2, c2, c3)))


# ---- 8-bit blocks: the twin of csrc/blocks8.h; the second dimension of ``x`` and of codes is a block ----


@triton.jit
def _quotient(x, y):
    """Correctly rounded; 0 where the divisor is."""
    there = y != 0.0
    return tl.where(there, tl.math.div_rn(x, tl.where(there, y, 1.0)), 0.0)


@triton.jit
def _reciprocal(x):
    return tl.math.div_rn(0.0 * x + 1.0, x)


@triton.jit
def _finite_pattern(x):
    a = _bits(x) & MAGNITUDE
    return tl.where(a >= INFINITY, 0, a).to(tl.int32)


@triton.jit
def _thresholds(block, step, SIZE: tl.constexpr):
    """Where the elements of each block round up, in [1, 2)."""
    h = block.to(tl.uint32) * 0x9E3779B1
    h = (h ^ (h >> 15)) * 0x85EBCA6B
    now = step.to(tl.uint32)
    narrow = (now < 2).to(tl.uint32) + (now < 4).to(tl.uint32) + (now < 8).to(tl.uint32)
    narrow += (now < 16).to(tl.uint32) + (now < 32).to(tl.uint32)
    least = 0x3FC00000 - ((0 * narrow + 0x400000) >> narrow)
    lane = tl.arange(0, SIZE).to(tl.uint32) * 0xC13FA9A9
    return _float((((h + now * 0x9E3779B9)[:, None] + lane[None, :]) >> (9 + narrow)) + least)


@triton.jit
def _unsigned_block(scale):
    step = ((8 + (scale & 7)) << (11 + ((scale >> 3) & 7))).to(tl.int32)
    return ((scale >> 6) << 21).to(tl.int32)[:, None], step[:, None]


@triton.jit
def _curve_bits(curve):
    return tl.where(curve < 2, 7 - curve, 5)


@triton.jit
def _signed_block(scale):
    """Scale, and the curve: its bend, how often the exponent is halved, what that adds, and the level it approaches."""
    low = scale & 0xFF
    curve = tl.where(low < 192, low >> 7, (low >> 5) - 4)
    bits = _curve_bits(curve)
    top = _float(((scale >> 8) << 23 | (scale & ((1 << bits) - 1)) << (23 - bits)).to(tl.uint32))
    bend = tl.where(curve == 0, 0.75, tl.where(curve == 1, 2.0, 1.0))
    halvings = tl.where(curve < 2, 0, curve - 1)
    bias = 0x3F800000 - (0x3F800000 >> halvings)
    reach = tl.where(curve == 0, 296.3333435058594, tl.where(curve == 1, 190.5, 254.0))
    return top, bend, halvings[:, None], bias[:, None], reach[:, None]


@triton.jit
def blocks8_to_float(codes, scale, SIGNED: tl.constexpr):
    """Values of ``[blocks, 32]`` codes and ``[blocks]`` scales."""
    code = codes.to(tl.int32)
    if SIGNED:
        top, bend, halvings, bias, reach = _signed_block(scale.to(tl.int32))
        level = tl.where(code < 128, code, 256 - code).to(tl.float32)
        z = tl.math.div_rn(level, reach - level)
        root = tl.maximum(_bits(z).to(tl.int32, bitcast=True) - bias, 0)
        x = _float((root << halvings).to(tl.uint32)) * tl.math.div_rn(top, bend)[:, None]
        sign = (code & 0x80).to(tl.uint32) << 24
        return _float(tl.where(code == 0x80, 0x7FC00000, _bits(x) | sign))
    low, step = _unsigned_block(scale.to(tl.uint32))
    end = (low + (code - 1) * step).to(tl.uint32)
    u = tl.where(end < INFINITY, end, INFINITY - 1)
    return _float(tl.where(code == 0, 0, tl.where(code == 255, 0x7FC00000, u)))


@triton.jit
def _signed_scale(finite):
    largest = tl.max(finite, 1)
    high = finite >> 16
    # The deficits in the low half, how many there are in the high one: both take one sum.
    deficits = tl.where(high != 0, tl.minimum((largest >> 16)[:, None] - high, 1024) + 0x10000, 0)
    both = tl.sum(deficits, 1)
    deficit = both & 0xFFFF
    count = both >> 16
    curve = (deficit > 345 * count).to(tl.int32) + (deficit > 512 * count).to(tl.int32)
    curve += (deficit > 614 * count).to(tl.int32)
    bits = _curve_bits(curve)
    bounded = tl.minimum(tl.maximum(largest, 0x11000000), 0x7E800000)
    top = (bounded + (1 << (22 - bits))) >> (23 - bits)
    first = tl.where(curve < 2, curve * 128, curve * 32 + 128)
    return tl.where(largest == 0, 0, (top >> bits) << 8 | first | (top & ((1 << bits) - 1)))


@triton.jit
def _unsigned_scale(finite):
    largest = tl.max(finite, 1)
    smallest = tl.min(tl.where(finite == 0, 0x7FFFFFFF, finite), 1)
    bound = (largest - 994836480 + 0x1FFFFF) >> 21
    low = tl.maximum(smallest >> 21, tl.maximum(bound, 4))
    width = tl.maximum(largest - (low << 21), 1).to(tl.float32)
    number = (_bits(width * _reciprocal(0.0 * width + 253.0)) + 0xFFFFF) >> 20
    index = tl.minimum(tl.maximum(number.to(tl.int32) - 1128, 0), 63)
    return tl.where(largest == 0, 0, low << 6 | index)


@triton.jit
def float_to_blocks8(x, block, step, SIGNED: tl.constexpr):
    """``[blocks, 32]`` codes and ``[blocks]`` scales; second moments round by the block's number and the step."""
    a = _bits(x) & MAGNITUDE
    if SIGNED:
        scale = _signed_scale(_finite_pattern(x))
        top, bend, halvings, bias, reach = _signed_block(scale)
        r = _float(a) * _quotient(bend, top)[:, None]
        z = _float((_bits(r) >> halvings.to(tl.uint32)) + bias.to(tl.uint32))
        y = tl.math.div_rn(reach * z, 1.0 + z)
        bounded = tl.where(y < 127.0, y, 127.0)
        level = (_bits(bounded + 12582912.0) & 0x7F).to(tl.int32)  # to nearest even
        code = tl.where((_bits(x) >> 31) != 0, (0 - level) & 0xFF, level)
        return tl.where(a >= INFINITY, 0x80, code).to(tl.uint8), scale.to(tl.uint16)
    scale = _unsigned_scale(_finite_pattern(x))
    low, patterns = _unsigned_block(scale.to(tl.uint32))
    above = (tl.maximum(a.to(tl.int32), low) - low).to(tl.float32)
    level = (above * _reciprocal(patterns.to(tl.float32)) + _thresholds(block, step, x.shape[1])).to(tl.int32)
    code = tl.where(a >= INFINITY, 255, tl.minimum(level, 254))
    return tl.where(a == 0, 0, code).to(tl.uint8), scale.to(tl.uint16)
