"""The storage formats in plain torch: the specification of ``csrc/formats.h`` and ``csrc/blocks8.h``, bit for bit.

Patterns of unsigned 32-bit integers are held in int64 tensors, where shifts and comparisons are those of unsigned numbers.
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
        bfloat16 and 16 bits: exact for every value; the parameter is the master rounded to nearest, ties away from zero.
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


def encode_blocks8(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Float32 values as 8-bit codes (shape of ``x``) and one int32 scale per block of 64 elements in memory order."""
    flat = x.flatten()
    padded = torch.nn.functional.pad(flat, (0, blocks8(flat.numel()) * BLOCK8 - flat.numel()))
    u = bits_of(padded).view(-1, BLOCK8)
    magnitude = u & _MAGNITUDE
    smallest = torch.where(magnitude == 0, _MAGNITUDE, magnitude).amin(1)
    largest = magnitude.amax(1)
    low = torch.where(largest == 0, 0, smallest) >> 16
    high = ((largest + 0xFFFF) >> 16).clamp(max=0x7F80)
    scale = low | (high << 16)
    levels = 126.0 if signed else 254.0
    offset, _, inverse = _block8_range(scale, levels)
    code = ((magnitude - offset).to(torch.float32) * inverse + 0.5).to(torch.int64) + 1
    code = torch.where(magnitude == 0, 0, code.clamp(1, int(levels) + 1))
    if signed:
        code = code | ((u >> 24) & 0x80)
    codes = code.flatten()[: flat.numel()].to(torch.uint8).view(x.shape)
    return codes, float_of(scale).view(torch.int32)


def decode_blocks8(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The float32 values of 8-bit codes."""
    flat = codes.flatten().to(torch.int64)
    padded = torch.nn.functional.pad(flat, (0, scales.numel() * BLOCK8 - flat.numel())).view(-1, BLOCK8)
    offset, step, _ = _block8_range(scales.to(torch.int64) & _MASK, 126.0 if signed else 254.0)
    level = padded & 0x7F if signed else padded
    u = offset + ((level - 1).to(torch.float32) * step + 0.5).to(torch.int64)
    u = torch.where(level == 0, 0, u)
    if signed:
        u = u | ((padded & 0x80) << 24)
    return float_of(u).flatten()[: flat.numel()].view(codes.shape)


def _block8_range(scale: Tensor, levels: float) -> tuple[Tensor, Tensor, Tensor]:
    offset = (scale & 0xFFFF) << 16
    width = ((scale & 0xFFFF0000) - offset).to(torch.float32)
    inverse = torch.where(width > 0, torch.full_like(width, levels) / width, 0.0)
    return offset.unsqueeze(1), (width / levels).unsqueeze(1), inverse.unsqueeze(1)
