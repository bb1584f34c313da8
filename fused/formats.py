"""The storage formats in plain torch: the specification of ``csrc/formats.h`` and ``csrc/blocks8.h``, bit for bit.

Patterns of unsigned 32-bit integers are held in int64 tensors, where shifts and comparisons are those of unsigned
numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import BLOCK8, blocks8

_MASK = 0xFFFFFFFF
_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000


def bits_of(x: Tensor) -> Tensor:
    """The bit patterns of float32 values as int64 in [0, 2^32)."""
    return x.contiguous().view(torch.int32).to(torch.int64) & _MASK


def float_of(bits: Tensor) -> Tensor:
    """The float32 values of bit patterns."""
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
    return signed.to(torch.int32).view(torch.float32)


def _half_bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF


def _half_of(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16).view(dtype)


# ---- stochastic rounding ----


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    low = (b & 0xFFFF) * a
    high = (b >> 16) * a + (low >> 16)
    return (high >> 16) & _MASK, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: int, counter: Tensor, stream: int, step: int | Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): 4 words per counter, shape ``(len(counter), 4)``."""
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2 = torch.full_like(c0, stream & _MASK)
    number = step.to(torch.int64) if isinstance(step, Tensor) else int(step)  # a tensor is not read: no graph break
    c3 = torch.zeros_like(c0) + (number & _MASK)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _mul_hi_lo(0xD2511F53, c0)
        high1, low1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def random_bits(
    seed: int, stream: int, operand: int, step: int | Tensor, numel: int, device: torch.device
) -> Tensor:
    """32 random bits for each element of one operand (0: parameter, 1 + k: state k) of a tensor."""
    counters = torch.arange((numel + 3) // 4, dtype=torch.int64, device=device)
    return philox(seed, counters, stream * 8 + operand, step).flatten()[:numel]


def round_stochastic(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Float32 values rounded to bfloat16 or float16 with the probability of the distance."""
    u = bits_of(x)
    magnitude = u & _MAGNITUDE
    if dtype == torch.bfloat16:
        special = torch.where(magnitude > _INFINITY, 0x7FC0, u >> 16)
        return _half_of(torch.where(magnitude >= _INFINITY, special, ((u + (random >> 16)) & _MASK) >> 16), dtype)
    special = torch.where(magnitude > _INFINITY, 0x7E00, 0x7C00)
    scaled = float_of(torch.where(magnitude < 0x38800000, magnitude, 0)) * 2.0**24
    whole = scaled.to(torch.int64)
    up = (random >> 8).to(torch.float32) * 2.0**-24 < scaled - whole.to(torch.float32)
    normal = (magnitude - (112 << 23) + (random >> 19)) >> 13
    half = torch.where(magnitude >= 0x47800000, special, torch.where(magnitude < 0x38800000, whole + up, normal))
    return _half_of(half | ((u >> 16) & 0x8000), dtype)


# ---- a float32 master as a low-precision parameter and a remainder ----


def split_master(master: Tensor, dtype: torch.dtype, bits: int, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A float32 master as ``(parameter, remainder)``.

    Args:
        master: float32 values.
        dtype: bfloat16 or float16, of the parameter.
        bits: 16 or 8, of the remainder.
        random: 32 random bits per element to round an 8-bit remainder stochastically; None: to nearest.

    Numerics:
        bfloat16 and 16 bits: exact for every value; the parameter is the master rounded to nearest, ties away from
        zero.
        bfloat16 and 8 bits: the master rounded to 16 significant bits, relative error at most 2^-16.
        float16 and 16 bits: exact for magnitudes in [2^-14, 65520), else an absolute error of at most 2^-40.
        float16 and 8 bits: relative error at most 2^-19 (2^-18 at the upper end of a spacing), below 2^-14 an absolute
        error of at most 2^-32. NaN, infinities and -0.0 survive.
    """
    rounding = 0x80 if random is None else random >> 24
    remainder_dtype = torch.int16 if bits == 16 else torch.int8
    u = bits_of(master)
    magnitude = u & _MAGNITUDE
    if dtype == torch.bfloat16:
        u = torch.where(magnitude > _INFINITY, 0x7FC00000, u)
        if bits == 8:
            u = torch.where(magnitude >= _INFINITY, u, (u + rounding) & 0xFFFFFF00)
        param = _half_of(((u + 0x8000) >> 16) & 0xFFFF, dtype)
        low = u & 0xFFFF if bits == 16 else (u >> 8) & 0xFF
        limit = 1 << (bits - 1)
        return param, torch.where(low >= limit, low - 2 * limit, low).to(remainder_dtype)
    half = master.to(torch.float16)
    code = _half_bits(half) & 0x7FFF
    denormal, special = code < 0x400, code >= 0x7C00
    unit = 2.0**39 if bits == 16 else 2.0**40
    wide = half.to(torch.float32).abs()
    difference = torch.where(denormal, master.abs() - wide, 0.0) * unit
    fixed = torch.trunc(difference + torch.where(difference < 0, -0.5, 0.5)).to(torch.int64)
    distance = torch.where(special, 0, torch.where(denormal, fixed, magnitude - bits_of(wide)))
    if bits == 8:
        shift = torch.where(denormal, 8, 5)
        distance = (distance + (torch.as_tensor(rounding, device=shift.device) >> (8 - shift))) >> shift
    limit = 1 << (bits - 1)
    return half, distance.clamp(-limit, limit - 1).to(remainder_dtype)


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of a parameter and its remainder."""
    bits = 16 if remainder.dtype == torch.int16 else 8
    limit = 1 << (bits - 1)
    code = _half_bits(param)
    signed = remainder.to(torch.int64)
    if param.dtype == torch.bfloat16:
        low = torch.where(signed < 0, signed + 2 * limit, signed)
        zero = (code & 0x7FFF) == 0
        borrow = (low >= limit) & ~zero
        low = torch.where((low >= limit) & zero, 0, low)
        return float_of(((code - borrow.to(torch.int64)) << 16) | (low << (16 - bits)))
    magnitude = code & 0x7FFF
    denormal, special = magnitude < 0x400, magnitude >= 0x7C00
    wide = param.to(torch.float32).abs()
    wide_bits = bits_of(wide)
    fixed = torch.where(denormal, wide, 0.0) + signed.to(torch.float32) * (2.0**-39 if bits == 16 else 2.0**-32)
    normal = wide_bits + (signed if bits == 16 else signed * 32)
    joined = torch.where(special, wide_bits, torch.where(denormal, bits_of(fixed), normal))
    return float_of(joined ^ ((code & 0x8000) << 16))


# ---- 8-bit blocks ----

_UNSIGNED_NAN, _UNSIGNED_LEVELS = 255, 254
_LOW_SHIFT, _STEP_SHIFT, _SMALLEST_STEP, _WIDEST_RANGE = 21, 20, 1128, 253 * (15 << 18)
_LANE_PHASE = 0xC13FA9A9
_SIGNED_NAN, _SIGNED_LEVELS = 0x80, 127
_SMALLEST_SCALE, _LARGEST_SCALE = 0x11000000, 0x7E800000
_DEFICIT_LIMIT = 8 * 128
_DEFICITS = (345, 512, 614)
_HALVINGS = (0, 0, 1, 2)
_BEND = (0.75, 2.0, 1.0, 1.0)
_SCALE_BITS = (7, 6, 5, 5)
_CURVE_FIRST = (0, 128, 192, 224)
_ONE = 0x3F800000
_NAN = 0x7FC00000


def encode_blocks8(x: Tensor, signed: bool, step: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Float32 values as 8-bit codes and one int16 scale per block of 32 elements.

    Args:
        x: float32 values of any shape; blocks follow its row-major order.
        signed: the code of first moments, else that of second moments, which drops signs.
        step: of the optimizer: second moments are rounded up or down by a sequence over the steps; None: to nearest.

    Returns:
        uint8 codes of the shape of ``x``, and int16 scales.
    """
    flat = x.flatten()
    count = blocks8(flat.numel())
    u = bits_of(torch.nn.functional.pad(flat, (0, count * BLOCK8 - flat.numel()))).view(count, BLOCK8)
    magnitude = u & _MAGNITUDE
    finite = torch.where(magnitude >= _INFINITY, 0, magnitude)
    if signed:
        codes, scales = _encode_signed(u, magnitude, finite)
    else:
        threshold = 1.5 if step is None else _thresholds(count, step, u.device)
        codes, scales = _encode_unsigned(magnitude, finite, threshold)
    return codes.flatten()[: flat.numel()].to(torch.uint8).view(x.shape), _signed16(scales)


def decode_blocks8(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The float32 values of 8-bit codes."""
    flat = codes.flatten().to(torch.int64)
    padded = torch.nn.functional.pad(flat, (0, scales.numel() * BLOCK8 - flat.numel())).view(-1, BLOCK8)
    words = (scales.to(torch.int64) & 0xFFFF).unsqueeze(1)
    values = _decode_signed(padded, words) if signed else _decode_unsigned(padded, words)
    return values.flatten()[: flat.numel()].view(codes.shape)


def _signed16(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)


def _unsigned_block(words: Tensor) -> tuple[Tensor, Tensor]:
    """Where the range begins, and the bit patterns per level."""
    index = words & 63
    return words >> 6 << _LOW_SHIFT, (8 + (index & 7)) << (11 + (index >> 3))


def _encode_unsigned(magnitude: Tensor, finite: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
    smallest = torch.where(finite == 0, _MAGNITUDE, finite).amin(1)
    largest = finite.amax(1)
    bound = (largest - _WIDEST_RANGE + (1 << _LOW_SHIFT) - 1) >> _LOW_SHIFT
    begin = torch.maximum(smallest >> _LOW_SHIFT, bound.clamp(min=4))
    width = (largest - (begin << _LOW_SHIFT)).clamp(min=1).to(torch.float32)
    index = ((bits_of(width * _reciprocal(width, 253)) + 0xFFFFF) >> _STEP_SHIFT) - _SMALLEST_STEP
    words = torch.where(largest == 0, 0, (begin << 6) | index.clamp(0, 63))
    low, step = _unsigned_block(words.unsqueeze(1))
    above = (torch.maximum(magnitude, low) - low).to(torch.float32)
    level = (above * step.to(torch.float32).reciprocal() + threshold).to(torch.int64)
    codes = torch.where(magnitude >= _INFINITY, _UNSIGNED_NAN, level.clamp(max=_UNSIGNED_LEVELS))
    return torch.where(magnitude == 0, 0, codes), words


def _reciprocal(like: Tensor, divisor: int) -> Tensor:
    return torch.full_like(like, divisor).reciprocal()


def _decode_unsigned(codes: Tensor, words: Tensor) -> Tensor:
    low, step = _unsigned_block(words)
    u = (low + (codes - 1) * step).clamp(max=_INFINITY - 1)
    return float_of(torch.where(codes == 0, 0, torch.where(codes == _UNSIGNED_NAN, _NAN, u)))


def _thresholds(count: int, step: int | Tensor, device: torch.device | None = None) -> Tensor:
    """Where second moments round up, in [1, 2): evenly spread over the steps and the lanes of each of ``count`` blocks.

    In the first steps averages move by more than a level, and nothing is gained by rounding up and down at random: the
    spread grows from almost that of rounding to nearest, 1.5, over 32 steps.
    """
    h = (torch.arange(count, dtype=torch.int64, device=device) & _MASK) * 0x9E3779B1 & _MASK
    h = _mul_hi_lo(0x85EBCA6B, h ^ (h >> 15))[1]
    now = step.to(torch.int64) if isinstance(step, Tensor) else torch.tensor(int(step), device=device)
    lanes = torch.arange(BLOCK8, dtype=torch.int64, device=device) * _LANE_PHASE
    phase = (h.unsqueeze(1) + (now * 0x9E3779B9 & _MASK) + lanes) & _MASK
    narrow = sum((now < 2**k).to(torch.int64) for k in range(1, 6))  # how often the spread is halved
    return float_of((phase >> (9 + narrow)) + _ONE + (1 << 22) - ((1 << 22) >> narrow))


def _table(values: tuple[float, ...], like: Tensor) -> Tensor:
    dtype = torch.int64 if isinstance(values[0], int) else torch.float32
    return torch.tensor(values, dtype=dtype, device=like.device)


def _signed_block(words: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale, and the curve: its bend, how often the exponent is halved, and the pattern that halving adds."""
    curve = torch.bucketize(words & 0xFF, _table(_CURVE_FIRST[1:], words), right=True)
    bits, halvings = _table(_SCALE_BITS, words)[curve], _table(_HALVINGS, words)[curve]
    top = float_of((words >> 8 << 23) | ((words & ((1 << bits) - 1)) << (23 - bits)))
    return top, _table(_BEND, words)[curve], halvings, _ONE - (_ONE >> halvings)


def _reach(bend: Tensor) -> Tensor:
    """The level that a curve approaches."""
    return _SIGNED_LEVELS * (1.0 + bend) / bend


def _encode_signed(u: Tensor, magnitude: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    largest = finite.amax(1, keepdim=True)
    high = finite >> 16
    deficit = torch.where(high != 0, ((largest >> 16) - high).clamp(max=_DEFICIT_LIMIT), 0).sum(1, keepdim=True)
    count = (high != 0).sum(1, keepdim=True)
    curve = (deficit > _table(_DEFICITS, u) * count).sum(1, keepdim=True)
    bits, first = _table(_SCALE_BITS, u)[curve], _table(_CURVE_FIRST, u)[curve]
    scale = (largest.clamp(_SMALLEST_SCALE, _LARGEST_SCALE) + (1 << (22 - bits))) >> (23 - bits)
    words = torch.where(largest == 0, 0, (scale >> bits << 8) | first | (scale & ((1 << bits) - 1)))
    top, bend, halvings, bias = _signed_block(words)
    reach, gain = _reach(bend), torch.where(top > 0, bend / top, 0.0)
    z = float_of((bits_of(float_of(magnitude) * gain) >> halvings) + bias)
    level = (reach * z / (1.0 + z)).clamp(max=_SIGNED_LEVELS).round().to(torch.int64)
    codes = torch.where(u >> 31 != 0, -level & 0xFF, level)
    return torch.where(magnitude >= _INFINITY, _SIGNED_NAN, codes), words.squeeze(1)


def _decode_signed(codes: Tensor, words: Tensor) -> Tensor:
    top, bend, halvings, bias = _signed_block(words)
    reach = _reach(bend)
    level = torch.where(codes < 128, codes, 256 - codes).to(torch.float32)
    z = level / (reach - level)
    x = float_of((bits_of(z) - bias).clamp(min=0) << halvings) * (top / bend)
    return float_of(torch.where(codes == _SIGNED_NAN, _NAN, bits_of(x) | ((codes & 0x80) << 24)))
