"""Rows of the table and the elements they name: loads and stores in any storage format.

A row is a ``TensorRow`` of ``csrc/table.h`` as ``ROW_WORDS`` 64-bit words, a group a ``GroupRow``. How elements are
accessed is a constant of the kernel: ``FULL``: all of them are there and lie on multiples of 16 bytes, so accesses are
unmasked and 128 bits wide; ``ALIGNED``: the mask holds for 32 elements or for none, which keeps accesses wide;
``MASKED``: nothing is known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import formats

ROW_WORDS = 16
PARAM, GRAD, MASTER, STATE, SCALE, STEP, NUMEL, GROUP = (tl.constexpr(word) for word in (0, 1, 2, 3, 7, 11, 12, 13))
WORDS = tl.constexpr(ROW_WORDS)
GROUP_WORDS = 18
GROUP_SIZE = tl.constexpr(GROUP_WORDS)
HYPERS, GRAD_SIGN, HYPER_AT, HYPER_FORMAT = (tl.constexpr(word) for word in (8, 8, 9, 17))

FLOAT32, FLOAT64, BFLOAT16, FLOAT16, REMAINDER16, REMAINDER8 = (tl.constexpr(number) for number in range(1, 7))
BLOCK8_SIGNED = tl.constexpr(7)  # 8: unsigned
BLOCK8 = tl.constexpr(32)
FULL, MASKED, ALIGNED = (tl.constexpr(number) for number in range(3))


@triton.jit
def pointer(address, dtype: tl.constexpr):
    return address.to(tl.pointer_type(dtype))


@triton.jit
def load(address, dtype: tl.constexpr, offset, mask, ACCESS: tl.constexpr):
    at = address.to(tl.pointer_type(dtype))
    if ACCESS != MASKED:
        at = tl.multiple_of(at, 16)
    if ACCESS == FULL:
        return tl.load(at + offset)
    return tl.load(at + offset, mask=mask, other=0)


@triton.jit
def store(address, dtype: tl.constexpr, offset, value, mask, ACCESS: tl.constexpr):
    at = address.to(tl.pointer_type(dtype))
    if ACCESS != MASKED:
        at = tl.multiple_of(at, 16)
    if ACCESS == FULL:
        tl.store(at + offset, value)
    else:
        tl.store(at + offset, value, mask=mask)


@triton.jit
def load_as(address, offset, mask, FORMAT: tl.constexpr, ACCESS: tl.constexpr, DOUBLE: tl.constexpr):
    """Elements of a stored tensor in the arithmetic's type."""
    if FORMAT == FLOAT32:
        x = load(address, tl.float32, offset, mask, ACCESS)
    elif FORMAT == FLOAT64:
        x = load(address, tl.float64, offset, mask, ACCESS)
    elif FORMAT == BFLOAT16:
        x = formats.bf16_to_float(load(address, tl.uint16, offset, mask, ACCESS))
    else:
        x = formats.fp16_to_float(load(address, tl.uint16, offset, mask, ACCESS))
    return x.to(tl.float64) if DOUBLE else x.to(tl.float32)


@triton.jit
def store_as(address, offset, mask, x, random, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr):
    if FORMAT == FLOAT32:
        store(address, tl.float32, offset, x, mask, ACCESS)
    elif FORMAT == FLOAT64:
        store(address, tl.float64, offset, x, mask, ACCESS)
    elif FORMAT == BFLOAT16:
        bits = formats.float_to_bf16_stochastic(x, random) if STOCHASTIC else formats.float_to_bf16(x)
        store(address, tl.uint16, offset, bits, mask, ACCESS)
    else:
        bits = formats.float_to_fp16_stochastic(x, random) if STOCHASTIC else formats.float_to_fp16(x)
        store(address, tl.uint16, offset, bits, mask, ACCESS)


@triton.jit
def load_param(
    row, offset, mask, PARAM_FORMAT: tl.constexpr, MASTER_FORMAT: tl.constexpr, ACCESS: tl.constexpr,
    DOUBLE: tl.constexpr,
):  # fmt: skip
    """The parameter, or its master where it has one."""
    param = tl.load(row + PARAM)
    master = tl.load(row + MASTER)
    if MASTER_FORMAT >= REMAINDER16:
        bits: tl.constexpr = 16 if MASTER_FORMAT == REMAINDER16 else 8
        high = load(param, tl.uint16, offset, mask, ACCESS)
        low = load(master, tl.uint16 if bits == 16 else tl.uint8, offset, mask, ACCESS)
        if PARAM_FORMAT == BFLOAT16:
            p = formats.join_bf16(high, low, bits)
        else:
            p = formats.join_fp16(high, low, bits)
    elif MASTER_FORMAT == FLOAT32:
        p = load_as(master, offset, mask, FLOAT32, ACCESS, DOUBLE)
    else:
        p = load_as(param, offset, mask, PARAM_FORMAT, ACCESS, DOUBLE)
    return p


@triton.jit
def store_param(
    row, offset, mask, p, random, PARAM_FORMAT: tl.constexpr, MASTER_FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr,
    ACCESS: tl.constexpr,
):  # fmt: skip
    param = tl.load(row + PARAM)
    master = tl.load(row + MASTER)
    if MASTER_FORMAT >= REMAINDER16:
        bits: tl.constexpr = 16 if MASTER_FORMAT == REMAINDER16 else 8
        rounding = random >> 24 if STOCHASTIC else 0 * random + 0x80
        if PARAM_FORMAT == BFLOAT16:
            high, low = formats.split_bf16(p, bits, rounding)
        else:
            high, low = formats.split_fp16(p, bits, rounding)
        store(param, tl.uint16, offset, high, mask, ACCESS)
        store(master, tl.uint16 if bits == 16 else tl.uint8, offset, low, mask, ACCESS)
    elif MASTER_FORMAT == FLOAT32:
        store_as(master, offset, mask, p, random, FLOAT32, False, ACCESS)
        store_as(param, offset, mask, p, random, PARAM_FORMAT, False, ACCESS)
    else:
        store_as(param, offset, mask, p, random, PARAM_FORMAT, STOCHASTIC, ACCESS)


@triton.jit
def _any_in_block(mask):
    """Whether an 8-bit block has elements inside: its scale is there, and nothing else may touch it."""
    return tl.max(tl.reshape(mask.to(tl.int32), (mask.shape[0] // BLOCK8, BLOCK8)), 1) != 0


@triton.jit
def _blocks_of(offset):
    """The numbers of the 8-bit blocks. No tensor has 2^31 of them."""
    number = (offset >> 5).to(tl.int32)
    return tl.min(tl.reshape(number, (offset.shape[0] // BLOCK8, BLOCK8)), 1)


@triton.jit
def load_state(
    row, k: tl.constexpr, offset, mask, FORMAT: tl.constexpr, ACCESS: tl.constexpr, DOUBLE: tl.constexpr
):
    """State ``k``; 8-bit blocks must not be divided: ``offset`` runs in whole blocks from a multiple of 32 on."""
    address = tl.load(row + STATE + k)
    if FORMAT >= BLOCK8_SIGNED:
        size: tl.constexpr = offset.shape[0]
        codes = tl.reshape(load(address, tl.uint8, offset, mask, ACCESS), (size // BLOCK8, BLOCK8))
        at = pointer(tl.load(row + SCALE + k), tl.uint16) + _blocks_of(offset)
        scale = tl.load(at) if ACCESS == FULL else tl.load(at, mask=_any_in_block(mask), other=0)
        x = formats.blocks8_to_float(codes, scale, FORMAT == BLOCK8_SIGNED)
        return tl.reshape(x, (size,))
    return load_as(address, offset, mask, FORMAT, ACCESS, DOUBLE)


@triton.jit
def store_state(
    row, k: tl.constexpr, offset, mask, x, random, step,
    FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    address = tl.load(row + STATE + k)
    if FORMAT >= BLOCK8_SIGNED:
        size: tl.constexpr = offset.shape[0]
        inside = x if ACCESS == FULL else tl.where(mask, x, 0.0)  # beyond the end nothing may touch a scale
        block = _blocks_of(offset)
        values = tl.reshape(inside, (size // BLOCK8, BLOCK8))
        codes, scale = formats.float_to_blocks8(values, block, step, FORMAT == BLOCK8_SIGNED)
        store(address, tl.uint8, offset, tl.reshape(codes, (size,)), mask, ACCESS)
        at = pointer(tl.load(row + SCALE + k), tl.uint16) + block
        if ACCESS == FULL:
            tl.store(at, scale)
        else:
            tl.store(at, scale, mask=_any_in_block(mask))
    else:
        store_as(address, offset, mask, x, random, FORMAT, STOCHASTIC, ACCESS)


@triton.jit
def hyper(group, k: tl.constexpr, mask):
    """A hyperparameter of each row: from the table, or from the device scalar that the group names."""
    value = tl.load(group + k, mask=mask, other=0).to(tl.float64, bitcast=True)
    at = tl.load(group + HYPER_AT + k, mask=mask, other=0)
    form = (tl.load(group + HYPER_FORMAT, mask=mask, other=0) >> (8 * k)) & 255
    there = at != 0
    single = tl.load(pointer(at, tl.float32), mask=there & (form == FLOAT32), other=0.0).to(tl.float64)
    double = tl.load(pointer(at, tl.float64), mask=there & (form == FLOAT64), other=0.0)
    half = tl.load(pointer(at, tl.uint16), mask=there & ((form == BFLOAT16) | (form == FLOAT16)), other=0)
    low = tl.where(form == BFLOAT16, formats.bf16_to_float(half), formats.fp16_to_float(half)).to(tl.float64)
    return tl.where(there, tl.where(form == FLOAT32, single, tl.where(form == FLOAT64, double, low)), value)
