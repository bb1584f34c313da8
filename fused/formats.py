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


def philox(seed: int, counter: Tensor, stream: int, step: int) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): 4 words per counter, shape ``(len(counter), 4)``."""
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2 = torch.full_like(c0, stream & _MASK)
    c3 = torch.full_like(c0, step & _MASK)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _mul_hi_lo(0xD2511F53, c0)
        high1, low1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def random_bits(seed: int, stream: int, operand: int, step: int, numel: int, device: torch.device) -> Tensor:
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

_UNSIGNED_NAN, _UNSIGNED_LEVELS, _UNSIGNED_OCTAVES = 255, 254, 64
_SIGNED_NAN, _SIGNED_LEVELS = 0x80, 127
_SMALLEST_SCALE, _LARGEST_SCALE = 0x0D800000, 0x7E800000
_DEFICIT_LIMIT = 20 * 128
_DEFICITS = (307, 371, 422, 512, 627, 768, 896)
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
        threshold = 0.5 if step is None else _thresholds(u, step)
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


def _unsigned_block(words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low = (words & 0xFF) << 23
    width = (((words >> 8) << 23) - low).to(torch.float32)
    steps = torch.full_like(width, _UNSIGNED_LEVELS - 1)
    return low, width / steps, torch.where(width > 0, steps / width, 0.0)


def _encode_unsigned(magnitude: Tensor, finite: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
    smallest = torch.where(finite == 0, _MAGNITUDE, finite).amin(1)
    largest = finite.amax(1)
    end = (largest >> 23) + 1
    begin = torch.maximum((smallest >> 23).clamp(min=1), (end - _UNSIGNED_OCTAVES).clamp(min=1))
    words = torch.where(largest == 0, 0, begin | (end.clamp(min=2) << 8))
    low, _, inverse = _unsigned_block(words.unsqueeze(1))
    above = torch.maximum(magnitude, low) - low
    level = (above.to(torch.float32) * inverse + threshold).to(torch.int64) + 1
    codes = torch.where(magnitude >= _INFINITY, _UNSIGNED_NAN, level.clamp(max=_UNSIGNED_LEVELS))
    return torch.where(magnitude == 0, 0, codes), words


def _decode_unsigned(codes: Tensor, words: Tensor) -> Tensor:
    low, step, _ = _unsigned_block(words)
    u = (low + ((codes - 1).to(torch.float32) * step + 0.5).to(torch.int64)).clamp(max=_INFINITY - 1)
    return float_of(torch.where(codes == 0, 0, torch.where(codes == _UNSIGNED_NAN, _NAN, u)))


def _thresholds(u: Tensor, step: int | Tensor) -> Tensor:
    """Where second moments round up, in [0, 1), evenly spread over the steps."""
    h = (torch.arange(u.numel(), dtype=torch.int64, device=u.device) & _MASK) * 0x9E3779B1 & _MASK
    h = _mul_hi_lo(0x85EBCA6B, h ^ (h >> 15))[1]
    advance = (int(step) if not isinstance(step, Tensor) else step.to(torch.int64)) * 0x9E3779B9
    return (((h + advance) & _MASK) >> 8).to(torch.float32).mul(2.0**-24).view(u.shape)


def _signed_block(words: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spread = words & 7
    mu = float_of(_ONE + ((spread * (spread + 9)) << 20))
    width = (bits_of(1.0 + mu) - _ONE).to(torch.float32)
    # number / tensor would be the reciprocal times the number: two roundings
    levels = torch.full_like(width, _SIGNED_LEVELS)
    return float_of((words >> 3) << 18), mu, width / levels, levels / width


def _encode_signed(u: Tensor, magnitude: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    largest = finite.amax(1, keepdim=True)
    nonzero = finite != 0
    deficit = torch.where(nonzero, ((largest >> 16) - (finite >> 16)).clamp(max=_DEFICIT_LIMIT), 0).sum(1, keepdim=True)
    count = nonzero.sum(1, keepdim=True)
    top = (largest.clamp(_SMALLEST_SCALE, _LARGEST_SCALE) + 0x3FFFF) >> 18
    spread = sum((deficit > limit * count).to(torch.int64) for limit in _DEFICITS)
    words = torch.where(largest == 0, 0, (top << 3) | spread)
    scale, mu, _, inverse = _signed_block(words)
    r = torch.minimum(float_of(torch.where(magnitude >= _INFINITY, 0, magnitude)), scale)
    s = torch.where(scale > 0, 1.75 * r / (scale + 0.75 * r), 0.0)
    level = ((bits_of(1.0 + mu * s) - _ONE).to(torch.float32) * inverse + 0.5).to(torch.int64)
    level = level.clamp(max=_SIGNED_LEVELS)
    codes = torch.where(level == 0, 0, level | ((u >> 24) & 0x80))
    return torch.where(magnitude >= _INFINITY, _SIGNED_NAN, codes), words.squeeze(1)


def _decode_signed(codes: Tensor, words: Tensor) -> Tensor:
    scale, mu, step, _ = _signed_block(words)
    s = (float_of(_ONE + ((codes & 0x7F).to(torch.float32) * step + 0.5).to(torch.int64)) - 1.0) * (1.0 / mu)
    x = scale * s / (1.75 - 0.75 * s)
    return float_of(torch.where(codes == _SIGNED_NAN, _NAN, bits_of(x) | ((codes & 0x80) << 24)))
