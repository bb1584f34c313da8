"""The kernels: prologue, norm and update, over a table of addresses in device memory.

A row of the table is a ``TensorRow`` of ``csrc/table.h`` as ``ROW_WORDS`` 64-bit words, a group a ``GroupRow``. Work
comes as a list of chunks: ``row * 2 + full`` in one tensor, the first element in another; ``full`` says that the chunk
has no tail and that every address in it is a multiple of 16 bytes: it takes an unmasked path with 128-bit accesses.
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


@triton.jit
def _pointer(address, dtype: tl.constexpr):
    return address.to(tl.pointer_type(dtype))


@triton.jit
def _load_as(address, offset, mask, FORMAT: tl.constexpr, MASKED: tl.constexpr, DOUBLE: tl.constexpr):
    """Elements of a stored tensor in the arithmetic's type."""
    if FORMAT == FLOAT32:
        x = _load(address, tl.float32, offset, mask, MASKED)
    elif FORMAT == FLOAT64:
        x = _load(address, tl.float64, offset, mask, MASKED)
    elif FORMAT == BFLOAT16:
        x = formats.bf16_to_float(_load(address, tl.uint16, offset, mask, MASKED))
    else:
        x = formats.fp16_to_float(_load(address, tl.uint16, offset, mask, MASKED))
    return x.to(tl.float64) if DOUBLE else x.to(tl.float32)


@triton.jit
def _load(address, dtype: tl.constexpr, offset, mask, MASKED: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    if MASKED:
        return tl.load(pointer + offset, mask=mask, other=0)
    return tl.load(tl.multiple_of(pointer, 16) + offset)


@triton.jit
def _store(address, dtype: tl.constexpr, offset, value, mask, MASKED: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    if MASKED:
        tl.store(pointer + offset, value, mask=mask)
    else:
        tl.store(tl.multiple_of(pointer, 16) + offset, value)


@triton.jit
def _store_as(
    address, offset, mask, x, random, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr
):
    if FORMAT == FLOAT32:
        _store(address, tl.float32, offset, x, mask, MASKED)
    elif FORMAT == FLOAT64:
        _store(address, tl.float64, offset, x, mask, MASKED)
    elif FORMAT == BFLOAT16:
        bits = formats.float_to_bf16_stochastic(x, random) if STOCHASTIC else formats.float_to_bf16(x)
        _store(address, tl.uint16, offset, bits, mask, MASKED)
    else:
        bits = formats.float_to_fp16_stochastic(x, random) if STOCHASTIC else formats.float_to_fp16(x)
        _store(address, tl.uint16, offset, bits, mask, MASKED)


@triton.jit
def _load_state(
    row, k: tl.constexpr, offset, mask, numel, FORMAT: tl.constexpr, MASKED: tl.constexpr, DOUBLE: tl.constexpr
):
    address = tl.load(row + STATE + k)
    if FORMAT >= BLOCK8_SIGNED:
        size: tl.constexpr = offset.shape[0]
        codes = tl.reshape(_load(address, tl.uint8, offset, mask, MASKED), (size // BLOCK8, BLOCK8))
        first = tl.min(tl.reshape(offset, (size // BLOCK8, BLOCK8)), 1)
        scales = _pointer(tl.load(row + SCALE + k), tl.uint16)
        scale = tl.load(scales + first // BLOCK8, mask=first < numel, other=0)
        x = formats.blocks8_to_float(codes, scale, FORMAT == BLOCK8_SIGNED)
        return tl.reshape(x, (size,))
    return _load_as(address, offset, mask, FORMAT, MASKED, DOUBLE)


@triton.jit
def _store_state(
    row, k: tl.constexpr, offset, mask, numel, x, random, step,
    FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    address = tl.load(row + STATE + k)
    if FORMAT >= BLOCK8_SIGNED:
        size: tl.constexpr = offset.shape[0]
        inside = tl.where(mask, x, 0.0) if MASKED else x  # beyond the end nothing may touch a scale
        element = tl.reshape(offset, (size // BLOCK8, BLOCK8))
        values = tl.reshape(inside, (size // BLOCK8, BLOCK8))
        codes, scale = formats.float_to_blocks8(values, element, step, FORMAT == BLOCK8_SIGNED)
        first = tl.min(element, 1)
        _store(address, tl.uint8, offset, tl.reshape(codes, (size,)), mask, MASKED)
        scales = _pointer(tl.load(row + SCALE + k), tl.uint16)
        tl.store(scales + first // BLOCK8, scale, mask=first < numel)
    else:
        _store_as(address, offset, mask, x, random, FORMAT, STOCHASTIC, MASKED)


@triton.jit
def _update_chunk(
    row, offset, mask, numel, c, factor, stream, step, seed,
    RULE: tl.constexpr, STATES: tl.constexpr, PARAM_FORMAT: tl.constexpr, GRAD_FORMAT: tl.constexpr,
    MASTER_FORMAT: tl.constexpr, STATE_FORMATS: tl.constexpr, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    double: tl.constexpr = PARAM_FORMAT == FLOAT64
    bits: tl.constexpr = 16 if MASTER_FORMAT == REMAINDER16 else (8 if MASTER_FORMAT == REMAINDER8 else 0)
    split: tl.constexpr = bits != 0
    param = tl.load(row + PARAM)
    master = tl.load(row + MASTER)
    g = _load_as(tl.load(row + GRAD), offset, mask, GRAD_FORMAT, MASKED, double) * factor
    if split:
        high = _load(param, tl.uint16, offset, mask, MASKED)
        low = _load(master, tl.uint16 if bits == 16 else tl.uint8, offset, mask, MASKED)
        if PARAM_FORMAT == BFLOAT16:
            p = formats.join_bf16(high, low, bits)
        else:
            p = formats.join_fp16(high, low, bits)
    elif MASTER_FORMAT == FLOAT32:
        p = _load_as(master, offset, mask, FLOAT32, MASKED, double)
    else:
        p = _load_as(param, offset, mask, PARAM_FORMAT, MASKED, double)
    s = ()
    for k in tl.static_range(STATES):
        s = s + (_load_state(row, k, offset, mask, numel, STATE_FORMATS[k], MASKED, double),)

    p, s = RULE(p, g, s, c)

    for k in tl.static_range(STATES):
        random = formats.random_bits(seed, offset, stream, 1 + k, step) if STOCHASTIC else offset.to(tl.uint32)
        _store_state(row, k, offset, mask, numel, s[k], random, step, STATE_FORMATS[k], STOCHASTIC, MASKED)
    random = formats.random_bits(seed, offset, stream, 0, step) if STOCHASTIC else offset.to(tl.uint32)
    if split:
        rounding = random >> 24 if STOCHASTIC else 0 * random + 0x80
        if PARAM_FORMAT == BFLOAT16:
            high, low = formats.split_bf16(p, bits, rounding)
        else:
            high, low = formats.split_fp16(p, bits, rounding)
        _store(param, tl.uint16, offset, high, mask, MASKED)
        _store(master, tl.uint16 if bits == 16 else tl.uint8, offset, low, mask, MASKED)
    elif MASTER_FORMAT == FLOAT32:
        _store_as(master, offset, mask, p, random, FLOAT32, False, MASKED)
        _store_as(param, offset, mask, p, random, PARAM_FORMAT, False, MASKED)
    else:
        _store_as(param, offset, mask, p, random, PARAM_FORMAT, STOCHASTIC, MASKED)


# Numbers that differ from model to model and from step to step must not make Triton compile again.


@triton.jit(do_not_specialize=["seed"])
def update(
    rows, chunk_rows, chunk_starts, constants, factors, steps, skip, seed,
    RULE: tl.constexpr, STATES: tl.constexpr, PARAM_FORMAT: tl.constexpr, GRAD_FORMAT: tl.constexpr,
    MASTER_FORMAT: tl.constexpr, STATE_FORMATS: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of one tensor per program: load, rule, store."""
    seed = seed.to(tl.int64)  # a small one comes with 32 bits
    if tl.load(skip) == 0:
        entry = tl.load(chunk_rows + tl.program_id(0))
        index = (entry >> 1).to(tl.int64)
        row = rows + index * WORDS
        c = ()
        for k in tl.static_range(HYPERS):
            value = tl.load(constants + index * HYPERS + k)
            c = c + (value if PARAM_FORMAT == FLOAT64 else value.to(tl.float32),)
        factor = tl.load(factors + index)
        factor = factor if PARAM_FORMAT == FLOAT64 else factor.to(tl.float32)
        step = tl.load(steps + index).to(tl.int64)
        stream = tl.load(row + GROUP) >> 32
        start = tl.load(chunk_starts + tl.program_id(0))
        numel = tl.load(row + NUMEL)
        offset = tl.multiple_of(start, 16) + tl.arange(0, BLOCK).to(tl.int64)
        if entry & 1:
            _update_chunk(
                row, offset, offset >= 0, numel, c, factor, stream, step, seed,
                RULE, STATES, PARAM_FORMAT, GRAD_FORMAT, MASTER_FORMAT, STATE_FORMATS, STOCHASTIC, False,
            )  # fmt: skip
        else:
            _update_chunk(
                row, offset, offset < numel, numel, c, factor, stream, step, seed,
                RULE, STATES, PARAM_FORMAT, GRAD_FORMAT, MASTER_FORMAT, STATE_FORMATS, STOCHASTIC, True,
            )  # fmt: skip


@triton.jit
def _hyper(group, k: tl.constexpr, mask):
    """A hyperparameter of each row: from the table, or from the device scalar that the group names."""
    value = tl.load(group + k, mask=mask, other=0).to(tl.float64, bitcast=True)
    at = tl.load(group + HYPER_AT + k, mask=mask, other=0)
    form = (tl.load(group + HYPER_FORMAT, mask=mask, other=0) >> (8 * k)) & 255
    there = at != 0
    single = tl.load(_pointer(at, tl.float32), mask=there & (form == FLOAT32), other=0.0).to(tl.float64)
    double = tl.load(_pointer(at, tl.float64), mask=there & (form == FLOAT64), other=0.0)
    half = tl.load(_pointer(at, tl.uint16), mask=there & ((form == BFLOAT16) | (form == FLOAT16)), other=0)
    low = tl.where(form == BFLOAT16, formats.bf16_to_float(half), formats.fp16_to_float(half)).to(tl.float64)
    return tl.where(there, tl.where(form == FLOAT32, single, tl.where(form == FLOAT64, double, low)), value)


@triton.jit(
    do_not_specialize=[
        "count", "norm_total", "grad_scale", "found_inf", "grad_norm", "skipped", "unscale", "grad_multiplier",
        "max_norm",
    ]
)  # fmt: skip
def prologue(
    rows, members, count, groups, constants, factors, steps, skip,
    norm_total, grad_scale, found_inf, grad_norm, skipped, unscale, grad_multiplier, max_norm,
    CONSTANTS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_FOUND_INF: tl.constexpr,
    HAS_GRAD_NORM: tl.constexpr, HAS_SKIPPED: tl.constexpr, HAS_UNSCALE: tl.constexpr, NORM_IS_MAX: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decides the step (``csrc/prologue.h``), counts it, and derives every row's constants."""
    factor = tl.load(grad_multiplier)
    if HAS_SCALE:
        factor = factor / tl.load(grad_scale).to(tl.float64)
    skips = 0
    if HAS_FOUND_INF:
        skips = (tl.load(found_inf) != 0.0).to(tl.int32)
    if HAS_UNSCALE:
        tl.store(unscale, factor)
    if HAS_NORM:
        raw = tl.load(norm_total)
        norm = (raw if NORM_IS_MAX else tl.sqrt(raw)) * tl.abs(factor)
        if HAS_GRAD_NORM:
            tl.store(grad_norm, norm.to(tl.float32))
        if SKIP_NONFINITE:
            skips = skips | (tl.load(norm_total + 1) != 0.0).to(tl.int32)
        if CLIP:
            limit = tl.load(max_norm)
            clip = limit / (norm + 1e-6)
            factor = factor * tl.where((clip >= 1.0) | (limit == float("inf")), 1.0, clip)
    if HAS_SKIPPED:
        tl.store(skipped, skips.to(tl.float32))
    tl.store(skip, skips)

    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = slot < count
    index = tl.load(members + slot, mask=mask, other=0)
    row = rows + index * WORDS
    group = groups + (tl.load(row + GROUP, mask=mask, other=0) & 0xFFFFFFFF) * GROUP_SIZE
    step_at = tl.load(row + STEP, mask=mask, other=0)
    counter = _pointer(step_at, tl.float32)
    counts = mask & (step_at != 0)
    step = tl.load(counter, mask=counts, other=0.0) + 1.0
    tl.store(counter, step, mask=counts & (skips == 0))
    # A rule without a count has history: "not the first step".
    step = tl.where(step_at != 0, step, 2.0).to(tl.float64)
    tl.store(steps + index, step, mask=mask)
    derived = CONSTANTS(
        _hyper(group, 0, mask), _hyper(group, 1, mask), _hyper(group, 2, mask), _hyper(group, 3, mask),
        _hyper(group, 4, mask), _hyper(group, 5, mask), _hyper(group, 6, mask), _hyper(group, 7, mask), step,
    )  # fmt: skip
    for k in tl.static_range(HYPERS):
        tl.store(constants + index * HYPERS + k, derived[k], mask=mask)
    sign = tl.load(group + GRAD_SIGN, mask=mask, other=0).to(tl.float64, bitcast=True)
    tl.store(factors + index, factor * sign, mask=mask)


@triton.jit
def _larger(a, b):
    """Maximum, NaN if either is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def _reduce_values(g, MAXIMUM: tl.constexpr):
    wide = g.to(tl.float64)
    if MAXIMUM:
        return tl.reduce(tl.abs(wide), 0, _larger)
    return tl.sum(wide * wide, 0)


@triton.jit
def _sum_rows(values, first, count, LANES: tl.constexpr, MAXIMUM: tl.constexpr):
    """Pairs from ``first`` on in one, in an order that depends on their number only."""
    lane = tl.arange(0, LANES).to(tl.int64)
    value = tl.zeros((LANES,), tl.float64)
    nonfinite = tl.zeros((LANES,), tl.float64)
    for begin in range(0, count, LANES):
        at = values + 2 * (first + begin + lane)
        inside = begin + lane < count
        # volatile: other programs wrote them, past this one's cache
        part = tl.load(at, mask=inside, other=0.0, volatile=True)
        nonfinite += tl.load(at + 1, mask=inside, other=0.0, volatile=True)
        value = _larger(part, value) if MAXIMUM else value + part
    return tl.reduce(value, 0, _larger) if MAXIMUM else tl.sum(value, 0), tl.sum(nonfinite, 0)


@triton.jit(do_not_specialize=["first", "row_count", "live_rows"])
def reduce(
    rows, chunk_rows, chunk_starts, first, partials, row_values, row_count, counters, live_rows, total,
    MAXIMUM: tl.constexpr, GRAD_FORMAT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One read of the gradients: ``(sum of squares or largest magnitude, whether not finite)`` of chunks, rows and all.

    ``partials`` holds all chunks of the step, of which this launch writes those from ``first`` on. The program that
    finishes a row last adds up its chunks, and the one that finishes the last of ``live_rows`` rows adds up the rows,
    in a fixed order whichever it is: the result is the same to the bit every time. Other rows are zero.
    """
    chunk = tl.program_id(0)
    index = (tl.load(chunk_rows + chunk) >> 1).to(tl.int64)
    row = rows + index * WORDS
    start = tl.load(chunk_starts + chunk)
    numel = tl.load(row + NUMEL)
    offset = start + tl.arange(0, BLOCK).to(tl.int64)
    g = _load_as(tl.load(row + GRAD), offset, offset < numel, GRAD_FORMAT, True, GRAD_FORMAT == FLOAT64)
    finite = tl.abs(g) < float("inf")
    here = (first + chunk).to(tl.int64)
    tl.store(partials + 2 * here, _reduce_values(g, MAXIMUM))
    tl.store(partials + 2 * here + 1, tl.sum((finite == 0).to(tl.float64), 0))
    tl.debug_barrier()
    chunks = (numel + BLOCK - 1) // BLOCK
    if tl.atomic_add(counters + index, 1, sem="acq_rel") == chunks - 1:
        tl.store(counters + index, 0)  # ready for the next step
        value, nonfinite = _sum_rows(partials, here - start // BLOCK, chunks, LANES, MAXIMUM)
        tl.store(row_values + 2 * index, value)
        tl.store(row_values + 2 * index + 1, (nonfinite != 0.0).to(tl.float64))
        tl.debug_barrier()
        if tl.atomic_add(counters + row_count, 1, sem="acq_rel") == live_rows - 1:
            tl.store(counters + row_count, 0)
            value, nonfinite = _sum_rows(row_values, 0, row_count, LANES, MAXIMUM)
            tl.store(total, value)
            tl.store(total + 1, nonfinite)
