"""The kernels of the elementwise optimizers: prologue, norm and update, over a table of addresses in device memory.

Work comes as a list of chunks: ``row * 2 + full`` in one tensor, the first element in another; ``full`` says that the
chunk has no tail and that every address in it is a multiple of 16 bytes: it takes an unmasked path with 128-bit
accesses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import formats
from .storage import (
    FLOAT32,
    FLOAT64,
    FULL,
    GRAD,
    GRAD_SIGN,
    GROUP,
    GROUP_SIZE,
    HYPERS,
    MASKED,
    NUMEL,
    STEP,
    WORDS,
    hyper,
    load_as,
    load_param,
    load_state,
    pointer,
    store_param,
    store_state,
)


@triton.jit
def _update_chunk(
    row, offset, mask, c, factor, stream, step, seed,
    RULE: tl.constexpr, STATES: tl.constexpr, PARAM_FORMAT: tl.constexpr, GRAD_FORMAT: tl.constexpr,
    MASTER_FORMAT: tl.constexpr, STATE_FORMATS: tl.constexpr, STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    double: tl.constexpr = PARAM_FORMAT == FLOAT64
    g = load_as(tl.load(row + GRAD), offset, mask, GRAD_FORMAT, ACCESS, double) * factor
    p = load_param(row, offset, mask, PARAM_FORMAT, MASTER_FORMAT, ACCESS, double)
    s = ()
    for k in tl.static_range(STATES):
        s = s + (load_state(row, k, offset, mask, STATE_FORMATS[k], ACCESS, double),)

    p, s = RULE(p, g, s, c)

    for k in tl.static_range(STATES):
        random = formats.random_bits(seed, offset, stream, 1 + k, step) if STOCHASTIC else offset.to(tl.uint32)
        store_state(row, k, offset, mask, s[k], random, step, STATE_FORMATS[k], STOCHASTIC, ACCESS)
    random = formats.random_bits(seed, offset, stream, 0, step) if STOCHASTIC else offset.to(tl.uint32)
    store_param(row, offset, mask, p, random, PARAM_FORMAT, MASTER_FORMAT, STOCHASTIC, ACCESS)


# What the step's control asks for, as bits of one constant.
(
    HAS_NORM, HAS_SCALE, HAS_FOUND_INF, HAS_GRAD_NORM, HAS_SKIPPED, HAS_UNSCALE, NORM_IS_MAX, SKIP_NONFINITE, CLIP,
) = (tl.constexpr(1 << bit) for bit in range(9))  # fmt: skip
CONTROL_POINTERS = ("norm_total", "grad_scale", "found_inf", "grad_norm", "skipped", "unscale")

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
                row, offset, offset >= 0, c, factor, stream, step, seed,
                RULE, STATES, PARAM_FORMAT, GRAD_FORMAT, MASTER_FORMAT, STATE_FORMATS, STOCHASTIC, FULL,
            )  # fmt: skip
        else:
            _update_chunk(
                row, offset, offset < numel, c, factor, stream, step, seed,
                RULE, STATES, PARAM_FORMAT, GRAD_FORMAT, MASTER_FORMAT, STATE_FORMATS, STOCHASTIC, MASKED,
            )  # fmt: skip


@triton.jit
def decide(norm_total, grad_scale, found_inf, grad_norm, skipped, unscale, scalars, skip, CONTROL: tl.constexpr):
    """Whether the step is skipped, and the gradients' factor (``csrc/prologue.h``).

    ``scalars`` holds the constant factor of the gradients and the largest norm. Every program decides the same and
    writes the same.
    """
    factor = tl.load(scalars)
    if HAS_SCALE & CONTROL:
        factor = factor / tl.load(grad_scale).to(tl.float64)
    skips = tl.zeros((), tl.int32)
    if HAS_FOUND_INF & CONTROL:
        skips = (tl.load(found_inf) != 0.0).to(tl.int32)
    if HAS_UNSCALE & CONTROL:
        tl.store(unscale, factor)
    if HAS_NORM & CONTROL:
        raw = tl.load(norm_total)
        norm = (raw if NORM_IS_MAX & CONTROL else tl.sqrt(raw)) * tl.abs(factor)
        if HAS_GRAD_NORM & CONTROL:
            tl.store(grad_norm, norm.to(tl.float32))
        if SKIP_NONFINITE & CONTROL:
            skips = skips | (tl.load(norm_total + 1) != 0.0).to(tl.int32)
        if CLIP & CONTROL:
            limit = tl.load(scalars + 1)
            clip = limit / (norm + 1e-6)
            factor = factor * tl.where((clip >= 1.0) | (limit == float("inf")), 1.0, clip)
    if HAS_SKIPPED & CONTROL:
        tl.store(skipped, skips.to(tl.float32))
    tl.store(skip, skips)
    return factor, skips


@triton.jit(do_not_specialize=["count", *CONTROL_POINTERS])
def prologue(
    rows, members, count, groups, constants, factors, steps, skip, scalars,
    norm_total, grad_scale, found_inf, grad_norm, skipped, unscale,
    CONSTANTS: tl.constexpr, CONTROL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decides the step, counts it, and derives every row's constants."""
    factor, skips = decide(norm_total, grad_scale, found_inf, grad_norm, skipped, unscale, scalars, skip, CONTROL)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = slot < count
    index = tl.load(members + slot, mask=mask, other=0)
    row = rows + index * WORDS
    group = groups + (tl.load(row + GROUP, mask=mask, other=0) & 0xFFFFFFFF) * GROUP_SIZE
    step_at = tl.load(row + STEP, mask=mask, other=0)
    counter = pointer(step_at, tl.float32)
    counts = mask & (step_at != 0)
    step = tl.load(counter, mask=counts, other=0.0) + 1.0
    # compared as a block: Triton 3.9's interpreter makes integers of a truth value that it spreads over one
    tl.store(counter, step, mask=counts & (tl.zeros((BLOCK,), tl.int32) + skips == 0))
    # A rule without a count has history: "not the first step".
    step = tl.where(step_at != 0, step, 2.0).to(tl.float64)
    tl.store(steps + index, step, mask=mask)
    derived = CONSTANTS(
        hyper(group, 0, mask), hyper(group, 1, mask), hyper(group, 2, mask), hyper(group, 3, mask),
        hyper(group, 4, mask), hyper(group, 5, mask), hyper(group, 6, mask), hyper(group, 7, mask), step,
    )  # fmt: skip
    for k in tl.static_range(HYPERS):
        tl.store(constants + index * HYPERS + k, derived[k], mask=mask)
    sign = tl.load(group + GRAD_SIGN, mask=mask, other=0).to(tl.float64, bitcast=True)
    tl.store(factors + index, factor * sign, mask=mask)


@triton.jit
def _largest(x):
    """The largest magnitude, NaN if there is one: as integers the bits are in the order of what they stand for."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, 0).to(x.dtype, bitcast=True)


@triton.jit
def _sum_of_squares(g, SIZE: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Those of each thread in float32, within 4 * 2^-24 of their sum, and all threads' in float64.

    Consumer GPUs and B300 do two float64 operations per clock and multiprocessor, where others do 64. A thread has
    eight elements, ``NEIGHBOURS`` of them side by side, 4 or 8: their sum asks nothing of another thread.
    """
    squares = g * g
    if NEIGHBOURS == 4:
        halves = tl.sum(tl.reshape(squares, (2, SIZE // 2)), 0)
    else:
        halves = tl.sum(tl.reshape(squares, (SIZE // 2, 2)), 1)
    quarters = tl.sum(tl.reshape(halves, (SIZE // 4, 2)), 1)
    sums = tl.sum(tl.reshape(quarters, (SIZE // 8, 2)), 1)
    return tl.sum(sums.to(tl.float64), 0)


@triton.jit
def _reduce_chunk(
    row, offset, mask, MAXIMUM: tl.constexpr, GRAD_FORMAT: tl.constexpr, ACCESS: tl.constexpr, SIZE: tl.constexpr
):
    """Sum of squares or largest magnitude, and 1 where not all is finite."""
    double: tl.constexpr = GRAD_FORMAT == FLOAT64
    g = load_as(tl.load(row + GRAD), offset, mask, GRAD_FORMAT, ACCESS, double)
    largest = _largest(g)
    if MAXIMUM:
        value = largest.to(tl.float64)
    elif double:
        value = tl.sum(g * g, 0)
    else:
        value = _sum_of_squares(g, SIZE, 4 if GRAD_FORMAT == FLOAT32 else 8)
        # Squares that underflow do not count beside 2^-80. NaN is in neither range.
        if not ((largest == 0.0) | ((largest >= 2.0**-40) & (largest < 2.0**50))):
            wide = g.to(tl.float64)
            value = tl.sum(wide * wide, 0)
    return value, tl.where(largest < float("inf"), 0.0, 1.0).to(tl.float64)


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
        value = tl.maximum(part, value, tl.PropagateNan.ALL) if MAXIMUM else value + part
    return _largest(value) if MAXIMUM else tl.sum(value, 0), tl.sum(nonfinite, 0)


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
    entry = tl.load(chunk_rows + chunk)
    index = (entry >> 1).to(tl.int64)
    row = rows + index * WORDS
    start = tl.load(chunk_starts + chunk)
    numel = tl.load(row + NUMEL)
    offset = tl.multiple_of(start, 16) + tl.arange(0, BLOCK).to(tl.int64)
    mask = offset < numel
    if entry & 1:
        value, nonfinite = _reduce_chunk(row, offset, mask, MAXIMUM, GRAD_FORMAT, FULL, BLOCK)
    else:
        value, nonfinite = _reduce_chunk(row, offset, mask, MAXIMUM, GRAD_FORMAT, MASKED, BLOCK)
    here = (first + chunk).to(tl.int64)
    tl.store(partials + 2 * here, value)
    tl.store(partials + 2 * here + 1, nonfinite)
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
