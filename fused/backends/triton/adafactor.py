"""Adafactor's kernels, the twins of ``csrc/cpu/adafactor_kernels.h``: three launches for the whole model.

    stats   sums of g^2 by row and column, and of p^2, over one tile. The program that finishes the last tile of a
            stripe of rows or columns averages them, the one that finishes a tensor counts its step. Where a tensor is
            not factored: its variance and the sum of its squared updates.
    norm    sums of the squared updates of factored tensors; whoever finishes a tensor derives its step size.
    apply   the parameters and first moments.

A shape is what ``csrc/table.h`` has as FactoredRow, how the tensor is divided (fixed by its shape alone), and where its
sums lie, as ``SHAPE_WORDS`` 64-bit words. Work comes as pairs ``(row * 8 + kind, number within the tensor)``. Sums are
taken per tile and then in order, whichever program comes last: the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import formats
from .kernels import CONTROL_POINTERS, decide
from .rules import div, lerp, power, sqrt
from .storage import (
    ALIGNED,
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

SHAPE_WORDS = 20
SHAPE_SIZE = tl.constexpr(SHAPE_WORDS)
(
    ROW_VAR, COL_VAR, VARIANCE, LEAD, ROWS, COLS, FLAGS, LINES, ROW_TILES, COL_TILES, TILES, SPANS, PARAM_SQUARES,
    UPDATE_SQUARES, MEAN, ROW_PART, COL_PART, MEAN_PART, COUNTERS,
) = (tl.constexpr(word) for word in range(19))  # fmt: skip
# Of a group's hyperparameters, in the order of fused/factored.py.
LR, BETA2_DECAY, EPS1, EPS2, THRESHOLD, WEIGHT_DECAY, BETA1, BETA2_CAP = (tl.constexpr(k) for k in range(8))
# Of Flag in fused/factored.py.
RELATIVE_STEP, WARMUP, SCALE_PARAMETER, ADD_EPS, DECAY_BY_STEP, DECAY_PLAIN, MOMENT_OF_UPDATE = (
    tl.constexpr(1 << bit) for bit in range(7)
)
# Of a tensor's constants: what `apply` takes, and the bound of the inverse root.
DECAY, INTO, MOMENT_DECAY, NEG_OUT, LIMIT = (tl.constexpr(k) for k in range(5))

# Kinds of tiles in `stats`: not factored; a part of a matrix with whole 16-byte words in every line; of another matrix;
# several small matrices ...
FLAT, WIDE, NARROW, SMALL = (tl.constexpr(kind) for kind in range(4))
# ... and of spans in `norm` and `apply`: elements in the order of memory, with a mask or without; a part of a matrix.
SPAN_FLAT, SPAN_FULL, SPAN_MATRIX = (tl.constexpr(kind) for kind in range(3))

BLOCK = tl.constexpr(512)
"""Elements of one iteration, but for parts of matrices: few, so that what is rare takes no more registers than they."""
ROUNDS = tl.constexpr(16)
"""Iterations of one span; float32 sums run that long."""
SPAN = tl.constexpr(16 * 1024)
MATRIX_LINES, MATRIX_WIDTH = tl.constexpr(16), tl.constexpr(64)
WIDE_LINES, WIDE_WIDTH = tl.constexpr(4), tl.constexpr(256)
NARROW_LINES, NARROW_WIDTH = tl.constexpr(8), tl.constexpr(64)


@triton.jit
def _max_nan(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def _inverse_root(second):
    return div(tl.full(second.shape, 1.0, second.dtype), sqrt(second))


@triton.jit
def _bounded(factor, limit):
    """NaN passes."""
    return tl.where(factor > limit, limit, factor)


@triton.jit
def _row_factor(mean, row):
    """A row's share of the inverse root. Infinite over an empty row, where the limit takes over."""
    there = row != 0.0
    return tl.where(there, sqrt(div(tl.where(there, mean, 0.0), tl.where(there, row, 1.0))), float("inf"))


@triton.jit
def _sum_of(values, count):
    """The sum of a list that other programs wrote, in an order that depends on its length only."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, count, BLOCK):
        total += tl.load(values + begin + lane, mask=begin + lane < count, other=0.0, volatile=True)
    return tl.sum(total, 0)


@triton.jit
def _last_of(counters, at, count):
    """Whether this program is the last of ``count`` to come here; what they wrote before is then there to be read."""
    tl.debug_barrier()
    last = tl.atomic_add(counters + at, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(counters + at, 0)  # ready for the next step
    return last


@triton.jit
def _eps1(group, there, DOUBLE: tl.constexpr):
    eps1 = hyper(group, EPS1, there)
    return tl.where(eps1 == eps1, eps1, 2.220446049250313e-16 if DOUBLE else 1.1920928955078125e-07)


@triton.jit
def _moments(group, flags, t, there, DOUBLE: tl.constexpr):
    """Of ``Adafactor::moments``: weight of the new square, what is added to it, least mean."""
    eps1 = _eps1(group, there, DOUBLE)
    weight = power(t, hyper(group, BETA2_DECAY, there))
    least_weight = 1.0 - hyper(group, BETA2_CAP, there)
    weight = tl.where(weight > least_weight, weight, least_weight)
    adds = (flags & ADD_EPS) != 0
    return weight, tl.where(adds, eps1, 0.0), tl.where(adds, 0.0, eps1)


@triton.jit
def _limit(group, flags, there, DOUBLE: tl.constexpr):
    """Of ``Adafactor::moments``: bound of the inverse root."""
    limit = 1.0 / _eps1(group, there, DOUBLE)
    largest = 1.7976931348623157e308 if DOUBLE else 3.4028234663852886e38
    return tl.where(((flags & ADD_EPS) == 0) & (limit < largest), limit, largest)


@triton.jit
def _finish_step(shape, group, t, numel, out, there):
    """``Adafactor::step`` from the sums over the whole tensor, for `apply`."""
    flags = tl.load(shape + FLAGS)
    tiles = tl.load(shape + TILES)
    count = tl.where(numel > 0, numel, 1).to(tl.float64)
    rms_param = tl.sqrt(_sum_of(pointer(tl.load(shape + PARAM_SQUARES), tl.float64), tiles) / count)
    lr = hyper(group, LR, there)
    eps2 = hyper(group, EPS2, there)
    beta1 = hyper(group, BETA1, there)
    averages = beta1 == beta1
    beta1 = tl.where(averages, beta1, 0.0)
    root = 1.0 / tl.sqrt(t)
    rho = tl.where(((flags & RELATIVE_STEP) == 0) | (lr < root), lr, root)
    rho = tl.where(((flags & WARMUP) == 0) | (rho < 1e-6 * t), rho, 1e-6 * t)
    size = rho * tl.where((flags & SCALE_PARAMETER) == 0, 1.0, tl.where(rms_param > eps2, rms_param, eps2))
    threshold = hyper(group, THRESHOLD, there)
    squares = pointer(tl.load(shape + UPDATE_SQUARES), tl.float64)
    count_of_squares = tl.where(tl.load(shape + ROW_VAR) == 0, tiles, tl.load(shape + SPANS))
    updates = _sum_of(squares, tl.where(threshold == threshold, count_of_squares, 0))
    ratio = tl.sqrt(updates / count) / threshold
    clipped = tl.where(ratio > 1.0, 1.0 / ratio, 1.0)
    decay_scale = tl.where((flags & DECAY_PLAIN) != 0, 1.0, tl.where((flags & DECAY_BY_STEP) != 0, size, lr))
    early = (flags & MOMENT_OF_UPDATE) != 0
    tl.store(out + DECAY, 1.0 - decay_scale * hyper(group, WEIGHT_DECAY, there))
    tl.store(out + INTO, (1.0 - beta1) * clipped * tl.where(early, 1.0, size))
    tl.store(out + MOMENT_DECAY, beta1)
    tl.store(out + NEG_OUT, tl.where(averages, tl.where(early, -size, -1.0), -size * clipped))


# ---- stats ----


@triton.jit
def _average_rows(shape, m, first, last, weight, added, T: tl.constexpr):
    """Averages lines [first, last) of matrix ``m``; their sums lie in as many places as there are tiles side by side.

    Returns the sum of the averages.
    """
    parts = tl.load(shape + COL_TILES)
    columns = tl.load(shape + COLS).to(tl.float64)
    base = m * tl.load(shape + ROWS)
    sums = pointer(tl.load(shape + ROW_PART), T)
    var = pointer(tl.load(shape + ROW_VAR), T)
    total = tl.zeros((32,), tl.float64)
    for begin in range(first, last, 32):
        line = begin + tl.arange(0, 32).to(tl.int64)
        inside = line < last
        collected = tl.zeros((32, 16), tl.float64)
        for part in range(0, parts, 16):
            which = part + tl.arange(0, 16).to(tl.int64)
            at = sums + (base + line)[:, None] * parts + which[None, :]
            there = inside[:, None] & (which < parts)[None, :]
            collected += tl.load(at, mask=there, other=0.0, volatile=True).to(tl.float64)
        mean = (tl.sum(collected, 1) / columns + added).to(T)
        averaged = lerp(tl.load(var + base + line, mask=inside, other=0.0), mean, weight)
        tl.store(var + base + line, averaged, mask=inside)
        total += tl.where(inside, averaged, 0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _average_columns(shape, m, first, last, weight, added, T: tl.constexpr):
    """Averages columns [first, last) of matrix ``m``; their sums lie in one place per tile of the stripe."""
    parts = tl.load(shape + ROW_TILES)
    columns = tl.load(shape + COLS)
    rows = tl.load(shape + ROWS).to(tl.float64)
    sums = pointer(tl.load(shape + COL_PART), T) + m * parts * columns
    var = pointer(tl.load(shape + COL_VAR), T) + m * columns
    for begin in range(first, last, 64):
        column = begin + tl.arange(0, 64).to(tl.int64)
        inside = column < last
        collected = tl.zeros((8, 64), tl.float64)
        for part in range(0, parts, 8):
            which = part + tl.arange(0, 8).to(tl.int64)
            at = sums + which[:, None] * columns + column[None, :]
            there = (which < parts)[:, None] & inside[None, :]
            collected += tl.load(at, mask=there, other=0.0, volatile=True).to(tl.float64)
        mean = (tl.sum(collected, 0) / rows + added).to(T)
        averaged = lerp(tl.load(var + column, mask=inside, other=0.0), mean, weight)
        tl.store(var + column, averaged, mask=inside)


@triton.jit
def _place_of(shape, number):
    """Of a tile: its matrix, its stripe of rows and of columns, and how many stripes there are of each."""
    row_tiles = tl.load(shape + ROW_TILES)
    col_tiles = tl.load(shape + COL_TILES)
    within = number % (row_tiles * col_tiles)
    return number // (row_tiles * col_tiles), within // col_tiles, number % col_tiles, row_tiles, col_tiles


@triton.jit
def _matrix_tile(
    row, shape, number, factor, scales, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACCESS: tl.constexpr,
    PARAM_FORMAT: tl.constexpr, GRAD_FORMAT: tl.constexpr, MASTER_FORMAT: tl.constexpr,
):  # fmt: skip
    """Sums over one tile of a matrix. Returns the sum of p^2."""
    double: tl.constexpr = PARAM_FORMAT == FLOAT64
    T: tl.constexpr = tl.float64 if double else tl.float32
    rows = tl.load(shape + ROWS)
    columns = tl.load(shape + COLS)
    if ACCESS == ALIGNED:
        columns = tl.multiple_of(columns, 32)
    lines = tl.load(shape + LINES)
    m, i, j, row_tiles, col_tiles = _place_of(shape, number)
    grad = tl.load(row + GRAD)
    row_part = pointer(tl.load(shape + ROW_PART), T)
    lane = tl.arange(0, HEIGHT * WIDTH)
    column = j * WIDTH + lane % WIDTH
    first = i * lines
    last = tl.minimum(first + lines, rows)
    col_sums = tl.zeros((WIDTH,), tl.float64)
    param_sum = tl.sum(col_sums, 0)
    for begin in range(first, last, ROUNDS * HEIGHT):
        squares = tl.zeros((HEIGHT, WIDTH), T)
        param_squares = tl.zeros((HEIGHT * WIDTH,), T)
        for top in range(begin, tl.minimum(begin + ROUNDS * HEIGHT, last), HEIGHT):
            line = top + lane // WIDTH
            inside = (line < last) & (column < columns)
            offset = (m * rows + line) * columns + column
            if ACCESS == ALIGNED:
                offset = tl.multiple_of(tl.max_contiguous(offset, 32), 32)
                inside = tl.max_constancy(inside, 32)
            g = load_as(grad, offset, inside, GRAD_FORMAT, ACCESS, double) * factor
            square = tl.reshape(tl.where(inside, g * g, 0.0), (HEIGHT, WIDTH))
            squares += square
            one = top + tl.arange(0, HEIGHT).to(tl.int64)
            tl.store(row_part + (m * rows + one) * col_tiles + j, tl.sum(square, 1), mask=one < last)
            if scales:
                p = load_param(row, offset, inside, PARAM_FORMAT, MASTER_FORMAT, ACCESS, double)
                param_squares += tl.where(inside, p * p, 0.0)
        col_sums += tl.sum(squares, 0).to(tl.float64)
        param_sum += tl.sum(param_squares, 0).to(tl.float64)

    one_column = j * WIDTH + tl.arange(0, WIDTH)
    col_part = pointer(tl.load(shape + COL_PART), T) + (m * row_tiles + i) * columns + one_column
    tl.store(col_part, col_sums.to(T), mask=one_column < columns)
    return param_sum


@triton.jit
def _average(shape, number, width, weight, added, least_mean, T: tl.constexpr):
    """The averages that were waiting for one tile of a matrix."""
    rows = tl.load(shape + ROWS)
    lead = tl.load(shape + LEAD)
    lines = tl.load(shape + LINES)
    m, i, j, row_tiles, col_tiles = _place_of(shape, number)
    counters = pointer(tl.load(shape + COUNTERS), tl.int32)
    # of the tensor 1, of matrices `lead`, of their stripes of rows, of their stripes of columns
    if _last_of(counters, 1 + lead + m * row_tiles + i, col_tiles):
        means = pointer(tl.load(shape + MEAN_PART), tl.float64) + m * row_tiles
        tl.store(means + i, _average_rows(shape, m, i * lines, tl.minimum((i + 1) * lines, rows), weight, added, T))
        if _last_of(counters, 1 + m, row_tiles):
            mean = _max_nan(_sum_of(means, row_tiles) / rows.to(tl.float64), least_mean)
            tl.store(pointer(tl.load(shape + MEAN), T) + m, mean.to(T))
    if _last_of(counters, 1 + lead + lead * row_tiles + m * col_tiles + j, row_tiles):
        last = tl.minimum((j + 1) * width, tl.load(shape + COLS))
        _average_columns(shape, m, j * width, last, weight, added, T)


@triton.jit
def _small_matrices(
    row, shape, number, factor, weight, added, least_mean, scales,
    PARAM_FORMAT: tl.constexpr, GRAD_FORMAT: tl.constexpr, MASTER_FORMAT: tl.constexpr,
):  # fmt: skip
    """Whole matrices, each small: one line, or column, per lane. Returns the sum of p^2."""
    double: tl.constexpr = PARAM_FORMAT == FLOAT64
    T: tl.constexpr = tl.float64 if double else tl.float32
    rows = tl.load(shape + ROWS)
    columns = tl.load(shape + COLS)
    grad = tl.load(row + GRAD)
    row_var = pointer(tl.load(shape + ROW_VAR), T)
    col_var = pointer(tl.load(shape + COL_VAR), T)
    first = number * tl.load(shape + LINES)
    last = tl.minimum(first + tl.load(shape + LINES), tl.load(shape + LEAD))
    lane = tl.arange(0, BLOCK).to(tl.int64)
    for begin in range(first * rows, last * rows, BLOCK):
        line = begin + lane
        inside = line < last * rows
        sums = tl.zeros((BLOCK,), tl.float64)
        for column in range(columns):
            g = load_as(grad, line * columns + column, inside, GRAD_FORMAT, MASKED, double) * factor
            sums += (g * g).to(tl.float64)
        mean = (sums / columns.to(tl.float64) + added).to(T)
        tl.store(row_var + line, lerp(tl.load(row_var + line, mask=inside, other=0.0), mean, weight), mask=inside)
    for begin in range(first * columns, last * columns, BLOCK):
        column = begin + lane
        inside = column < last * columns
        top = column // columns * (rows * columns) + column % columns
        sums = tl.zeros((BLOCK,), tl.float64)
        for line in range(rows):
            g = load_as(grad, top + line * columns, inside, GRAD_FORMAT, MASKED, double) * factor
            sums += (g * g).to(tl.float64)
        mean = (sums / rows.to(tl.float64) + added).to(T)
        tl.store(col_var + column, lerp(tl.load(col_var + column, mask=inside, other=0.0), mean, weight), mask=inside)
    tl.debug_barrier()
    for begin in range(first, last, BLOCK):
        m = begin + lane
        inside = m < last
        sums = tl.zeros((BLOCK,), tl.float64)
        for line in range(rows):
            sums += tl.load(row_var + m * rows + line, mask=inside, other=0.0, volatile=True).to(tl.float64)
        mean = _max_nan(sums / rows.to(tl.float64), least_mean)
        tl.store(pointer(tl.load(shape + MEAN), T) + m, mean.to(T), mask=inside)
    param_sum = 0.0 * weight.to(tl.float64)
    if scales:
        end = last * rows * columns
        for begin in range(first * rows * columns, end, BLOCK):
            offset = begin + lane
            p = load_param(row, offset, offset < end, PARAM_FORMAT, MASTER_FORMAT, MASKED, double)
            param_sum += tl.sum(tl.where(offset < end, p * p, 0.0), 0).to(tl.float64)
    return param_sum


@triton.jit
def _unfactored(
    row, shape, number, factor, weight, added, limit, scales,
    PARAM_FORMAT: tl.constexpr, GRAD_FORMAT: tl.constexpr, MASTER_FORMAT: tl.constexpr,
):  # fmt: skip
    """The variances of a span. Returns the sums of p^2 and of the squared updates."""
    double: tl.constexpr = PARAM_FORMAT == FLOAT64
    T: tl.constexpr = tl.float64 if double else tl.float32
    numel = tl.load(row + NUMEL)
    grad = tl.load(row + GRAD)
    variance = pointer(tl.load(shape + VARIANCE), T)
    squares = tl.zeros((BLOCK,), T)
    param_squares = tl.zeros((BLOCK,), T)
    begin = number * SPAN
    for at in range(begin, tl.minimum(begin + SPAN, numel), BLOCK):
        offset = at + tl.arange(0, BLOCK).to(tl.int64)
        inside = offset < numel
        g = load_as(grad, offset, inside, GRAD_FORMAT, MASKED, double) * factor
        averaged = lerp(tl.load(variance + offset, mask=inside, other=0.0), g * g + added, weight)
        tl.store(variance + offset, averaged, mask=inside)
        update = g * _bounded(_inverse_root(averaged), limit)
        squares += tl.where(inside, update * update, 0.0)
        if scales:
            p = load_param(row, offset, inside, PARAM_FORMAT, MASTER_FORMAT, MASKED, double)
            param_squares += tl.where(inside, p * p, 0.0)
    return tl.sum(param_squares, 0).to(tl.float64), tl.sum(squares, 0).to(tl.float64)


@triton.jit
def _tile(
    kind, row, shape, number, factor, weight, added, least_mean, limit, scales,
    PARAM_FORMAT: tl.constexpr, GRAD_FORMAT: tl.constexpr, MASTER_FORMAT: tl.constexpr,
):  # fmt: skip
    """One tile of any kind. Returns the sums of p^2 and, of tensors that are not factored, of the squared updates."""
    squares = 0.0 * weight.to(tl.float64)
    param_squares = 0.0 * weight.to(tl.float64)
    if kind == FLAT:
        param_squares, squares = _unfactored(
            row, shape, number, factor, weight, added, limit, scales, PARAM_FORMAT, GRAD_FORMAT, MASTER_FORMAT
        )
    elif kind == WIDE:
        param_squares = _matrix_tile(
            row, shape, number, factor, scales, WIDE_LINES, WIDE_WIDTH, ALIGNED,
            PARAM_FORMAT, GRAD_FORMAT, MASTER_FORMAT,
        )  # fmt: skip
    elif kind == NARROW:
        param_squares = _matrix_tile(
            row, shape, number, factor, scales, NARROW_LINES, NARROW_WIDTH, MASKED,
            PARAM_FORMAT, GRAD_FORMAT, MASTER_FORMAT,
        )  # fmt: skip
    else:
        param_squares = _small_matrices(
            row, shape, number, factor, weight, added, least_mean, scales, PARAM_FORMAT, GRAD_FORMAT, MASTER_FORMAT
        )
    return param_squares, squares


@triton.jit
def _count(rows, shape, groups, constants, factors, steps, index, factor, there, DOUBLE: tl.constexpr):
    """Counts a tensor's step, and derives it where that waits for nothing else."""
    row = rows + index * WORDS
    group = groups + (tl.load(row + GROUP) & 0xFFFFFFFF) * GROUP_SIZE
    counter = pointer(tl.load(row + STEP), tl.float32)
    counted = tl.load(counter) + 1.0
    tl.store(counter, counted)
    tl.store(steps + index, counted.to(tl.float64))
    tl.store(factors + index, factor)
    out = constants + index * HYPERS
    tl.store(out + LIMIT, _limit(group, tl.load(shape + FLAGS), there, DOUBLE))
    threshold = hyper(group, THRESHOLD, there)
    if (tl.load(shape + ROW_VAR) == 0) | (threshold != threshold):  # else `norm` comes first
        _finish_step(shape, group, counted.to(tl.float64), tl.load(row + NUMEL), out, there)


@triton.jit(do_not_specialize=list(CONTROL_POINTERS))
def stats(
    rows, shapes, tiles, groups, constants, factors, steps, skip, scalars,
    norm_total, grad_scale, found_inf, grad_norm, skipped, unscale,
    CONTROL: tl.constexpr, PARAM_FORMAT: tl.constexpr, GRAD_FORMAT: tl.constexpr, MASTER_FORMAT: tl.constexpr,
):  # fmt: skip
    """One tile per program: decides the step, as a prologue does, and averages squares; counts what is not skipped."""
    factor, skips = decide(norm_total, grad_scale, found_inf, grad_norm, skipped, unscale, scalars, skip, CONTROL)
    entry = tl.load(tiles + 2 * tl.program_id(0))
    number = tl.load(tiles + 2 * tl.program_id(0) + 1)
    if skips == 0:
        double: tl.constexpr = PARAM_FORMAT == FLOAT64
        T: tl.constexpr = tl.float64 if double else tl.float32
        index = entry >> 3
        there = entry >= 0
        row = rows + index * WORDS
        shape = shapes + index * SHAPE_SIZE
        group = groups + (tl.load(row + GROUP) & 0xFFFFFFFF) * GROUP_SIZE
        flags = tl.load(shape + FLAGS)
        t = (tl.load(pointer(tl.load(row + STEP), tl.float32)) + 1.0).to(tl.float64)
        weight, added, least_mean = _moments(group, flags, t, there, double)
        factor = factor * tl.load(group + GRAD_SIGN).to(tl.float64, bitcast=True)
        param_squares, squares = _tile(
            entry & 7, row, shape, number, factor.to(T), weight.to(T), added.to(T), least_mean,
            _limit(group, flags, there, double).to(T), (flags & SCALE_PARAMETER) != 0,
            PARAM_FORMAT, GRAD_FORMAT, MASTER_FORMAT,
        )  # fmt: skip
        # read again: what is not needed until here shall not take registers
        entry = tl.load(tiles + 2 * tl.program_id(0), volatile=True)
        number = tl.load(tiles + 2 * tl.program_id(0) + 1, volatile=True)
        shape = shapes + (entry >> 3) * SHAPE_SIZE
        kind = entry & 7
        if (kind == WIDE) | (kind == NARROW):
            width = tl.where(kind == WIDE, WIDE_WIDTH, NARROW_WIDTH)
            _average(shape, number, width, weight.to(T), added, least_mean, T)
        tl.store(pointer(tl.load(shape + PARAM_SQUARES), tl.float64) + number, param_squares)
        if kind == FLAT:
            tl.store(pointer(tl.load(shape + UPDATE_SQUARES), tl.float64) + number, squares)
        if _last_of(pointer(tl.load(shape + COUNTERS), tl.int32), 0, tl.load(shape + TILES)):
            _count(rows, shape, groups, constants, factors, steps, entry >> 3, factor, entry >= 0, double)


# ---- norm and apply ----


@triton.jit
def _divide(first, lane, divisor):
    """``first + lane`` divided by ``divisor``, where ``first`` is less: quotients and remainders."""
    if divisor >= BLOCK:  # one turn at most
        value = first + lane.to(tl.int64)
        turned = value >= divisor
        quotient = turned.to(tl.int64)
        remainder = value - tl.where(turned, divisor, 0)
    else:
        narrow = first.to(tl.uint32) + lane.to(tl.uint32)
        by = divisor.to(tl.uint32) + 0 * narrow
        quotient = (narrow // by).to(tl.int64)
        remainder = (narrow % by).to(tl.int64)
    return quotient, remainder


@triton.jit
def _flat_roots(shape, at, offset, inside, limit, ACCESS: tl.constexpr, double: tl.constexpr):
    """The inverse roots of elements that follow one another in memory from ``at`` on."""
    form: tl.constexpr = FLOAT64 if double else FLOAT32
    T: tl.constexpr = tl.float64 if double else tl.float32
    row_var = tl.load(shape + ROW_VAR)
    if row_var == 0:
        variance = load_as(tl.load(shape + VARIANCE), offset, inside, form, ACCESS, double)
        root = _inverse_root(variance)
    else:
        rows = tl.load(shape + ROWS)
        columns = tl.load(shape + COLS)
        line = at // columns
        below, column = _divide(at % columns, tl.arange(0, BLOCK), columns)
        further, _ = _divide(line % rows, below, rows)
        m = line // rows + further
        mean = tl.load(pointer(tl.load(shape + MEAN), T) + m, mask=inside, other=1.0)
        averaged = tl.load(pointer(row_var, T) + line + below, mask=inside, other=1.0)
        col_var = tl.load(pointer(tl.load(shape + COL_VAR), T) + m * columns + column, mask=inside, other=1.0)
        root = _row_factor(mean, averaged) * _inverse_root(col_var)
    return _bounded(root, limit)


@triton.jit
def _apply_block(
    row, offset, inside, update, c, stream, step, seed,
    PARAM_FORMAT: tl.constexpr, MASTER_FORMAT: tl.constexpr, STATE_FORMATS: tl.constexpr, STATES: tl.constexpr,
    STOCHASTIC: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    double: tl.constexpr = PARAM_FORMAT == FLOAT64
    decay, into, beta1, neg_out = c
    p = load_param(row, offset, inside, PARAM_FORMAT, MASTER_FORMAT, ACCESS, double)
    if STATES == 1:
        moment = load_state(row, 0, offset, inside, STATE_FORMATS[0], ACCESS, double)
        update = tl.math.fma(tl.zeros_like(update) + into, update, beta1 * moment)
        random = formats.random_bits(seed, offset, stream, 1, step) if STOCHASTIC else offset.to(tl.uint32)
        store_state(row, 0, offset, inside, update, random, step, STATE_FORMATS[0], STOCHASTIC, ACCESS)
    p = tl.math.fma(tl.zeros_like(p) + neg_out, update, p * decay)
    random = formats.random_bits(seed, offset, stream, 0, step) if STOCHASTIC else offset.to(tl.uint32)
    store_param(row, offset, inside, p, random, PARAM_FORMAT, MASTER_FORMAT, STOCHASTIC, ACCESS)


@triton.jit
def _flat_span(
    row, shape, number, factor, limit, c, stream, step, seed, APPLY: tl.constexpr, ACCESS: tl.constexpr,
    PARAM_FORMAT: tl.constexpr, GRAD_FORMAT: tl.constexpr, MASTER_FORMAT: tl.constexpr, STATE_FORMATS: tl.constexpr,
    STATES: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    double: tl.constexpr = PARAM_FORMAT == FLOAT64
    numel = tl.load(row + NUMEL)
    grad = tl.load(row + GRAD)
    squares = tl.zeros((BLOCK,), tl.float64 if double else tl.float32)
    begin = number * SPAN
    for at in range(begin, tl.minimum(begin + SPAN, numel), BLOCK):
        offset = tl.multiple_of(at, 16) + tl.arange(0, BLOCK).to(tl.int64)
        inside = offset < numel
        g = load_as(grad, offset, inside, GRAD_FORMAT, ACCESS, double) * factor
        update = g * _flat_roots(shape, at, offset, inside, limit, ACCESS, double)
        if APPLY:
            _apply_block(
                row, offset, inside, update, c, stream, step, seed,
                PARAM_FORMAT, MASTER_FORMAT, STATE_FORMATS, STATES, STOCHASTIC, ACCESS,
            )  # fmt: skip
        else:
            squares += update * update if ACCESS == FULL else tl.where(inside, update * update, 0.0)
    return tl.sum(squares, 0).to(tl.float64)


@triton.jit
def _matrix_span(
    row, shape, number, factor, limit, c, stream, step, seed, APPLY: tl.constexpr,
    PARAM_FORMAT: tl.constexpr, GRAD_FORMAT: tl.constexpr, MASTER_FORMAT: tl.constexpr, STATE_FORMATS: tl.constexpr,
    STATES: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    double: tl.constexpr = PARAM_FORMAT == FLOAT64
    T: tl.constexpr = tl.float64 if double else tl.float32
    rows = tl.load(shape + ROWS)
    columns = tl.multiple_of(tl.load(shape + COLS), 32)
    down = (rows + ROUNDS * MATRIX_LINES - 1) // (ROUNDS * MATRIX_LINES)
    across = (columns + MATRIX_WIDTH - 1) // MATRIX_WIDTH
    m = number // (down * across)
    first = number % (down * across) // across * (ROUNDS * MATRIX_LINES)
    left = number % across * MATRIX_WIDTH
    lane = tl.arange(0, MATRIX_LINES * MATRIX_WIDTH)
    column = left + lane % MATRIX_WIDTH
    one_column = left + tl.arange(0, MATRIX_WIDTH)
    col_var = pointer(tl.load(shape + COL_VAR), T) + m * columns + one_column
    col_factor = _inverse_root(tl.load(col_var, mask=one_column < columns, other=1.0))
    row_var = pointer(tl.load(shape + ROW_VAR), T) + m * rows
    mean = tl.load(pointer(tl.load(shape + MEAN), T) + m)
    grad = tl.load(row + GRAD)
    squares = tl.zeros((MATRIX_LINES * MATRIX_WIDTH,), T)
    for top in range(first, tl.minimum(first + ROUNDS * MATRIX_LINES, rows), MATRIX_LINES):
        one = top + tl.arange(0, MATRIX_LINES).to(tl.int64)
        row_factor = _row_factor(mean, tl.load(row_var + one, mask=one < rows, other=1.0))
        root = tl.reshape(row_factor[:, None] * col_factor[None, :], (MATRIX_LINES * MATRIX_WIDTH,))
        line = top + lane // MATRIX_WIDTH
        inside = tl.max_constancy((line < rows) & (column < columns), 32)
        offset = tl.multiple_of(tl.max_contiguous((m * rows + line) * columns + column, 32), 32)
        g = load_as(grad, offset, inside, GRAD_FORMAT, ALIGNED, double) * factor
        update = g * _bounded(root, limit)
        if APPLY:
            _apply_block(
                row, offset, inside, update, c, stream, step, seed,
                PARAM_FORMAT, MASTER_FORMAT, STATE_FORMATS, STATES, STOCHASTIC, ALIGNED,
            )  # fmt: skip
        else:
            squares += tl.where(inside, update * update, 0.0)
    return tl.sum(squares, 0).to(tl.float64)


@triton.jit
def _span(
    kind, row, shape, number, factor, limit, c, stream, step, seed, APPLY: tl.constexpr,
    PARAM_FORMAT: tl.constexpr, GRAD_FORMAT: tl.constexpr, MASTER_FORMAT: tl.constexpr, STATE_FORMATS: tl.constexpr,
    STATES: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    if kind == SPAN_MATRIX:
        squares = _matrix_span(
            row, shape, number, factor, limit, c, stream, step, seed, APPLY,
            PARAM_FORMAT, GRAD_FORMAT, MASTER_FORMAT, STATE_FORMATS, STATES, STOCHASTIC,
        )  # fmt: skip
    elif kind == SPAN_FULL:
        squares = _flat_span(
            row, shape, number, factor, limit, c, stream, step, seed, APPLY, FULL,
            PARAM_FORMAT, GRAD_FORMAT, MASTER_FORMAT, STATE_FORMATS, STATES, STOCHASTIC,
        )  # fmt: skip
    else:
        squares = _flat_span(
            row, shape, number, factor, limit, c, stream, step, seed, APPLY, MASKED,
            PARAM_FORMAT, GRAD_FORMAT, MASTER_FORMAT, STATE_FORMATS, STATES, STOCHASTIC,
        )  # fmt: skip
    return squares


@triton.jit
def _arrive(rows, shapes, groups, constants, steps, index, number, squares, there):
    """After a span of `norm`; whoever is the last of a tensor derives its step."""
    shape = shapes + index * SHAPE_SIZE
    tl.store(pointer(tl.load(shape + UPDATE_SQUARES), tl.float64) + number, squares)
    if _last_of(pointer(tl.load(shape + COUNTERS), tl.int32), 0, tl.load(shape + SPANS)):
        row = rows + index * WORDS
        group = groups + (tl.load(row + GROUP) & 0xFFFFFFFF) * GROUP_SIZE
        out = constants + index * HYPERS
        _finish_step(shape, group, tl.load(steps + index), tl.load(row + NUMEL), out, there)


@triton.jit
def norm(
    rows, shapes, spans, groups, constants, factors, steps, skip,
    PARAM_FORMAT: tl.constexpr, GRAD_FORMAT: tl.constexpr,
):  # fmt: skip
    """The squared updates of one span of a factored tensor."""
    if tl.load(skip) == 0:
        T: tl.constexpr = tl.float64 if PARAM_FORMAT == FLOAT64 else tl.float32
        entry = tl.load(spans + 2 * tl.program_id(0))
        number = tl.load(spans + 2 * tl.program_id(0) + 1)
        index = entry >> 3
        there = entry >= 0
        row = rows + index * WORDS
        shape = shapes + index * SHAPE_SIZE
        group = groups + (tl.load(row + GROUP) & 0xFFFFFFFF) * GROUP_SIZE
        out = constants + index * HYPERS
        threshold = hyper(group, THRESHOLD, there)
        if threshold == threshold:
            squares = _span(
                entry & 7, row, shape, number, tl.load(factors + index).to(T), tl.load(out + LIMIT).to(T), (), 0, 0, 0,
                False, PARAM_FORMAT, GRAD_FORMAT, 0, (), 0, False,
            )  # fmt: skip
            # read again: what is not needed until here shall not take registers
            entry = tl.load(spans + 2 * tl.program_id(0), volatile=True)
            number = tl.load(spans + 2 * tl.program_id(0) + 1, volatile=True)
            _arrive(rows, shapes, groups, constants, steps, entry >> 3, number, squares, entry >= 0)


@triton.jit(do_not_specialize=["seed"])
def apply(
    rows, shapes, spans, constants, factors, steps, skip, seed,
    PARAM_FORMAT: tl.constexpr, GRAD_FORMAT: tl.constexpr, MASTER_FORMAT: tl.constexpr, STATE_FORMATS: tl.constexpr,
    STATES: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """The parameters and first moments of one span."""
    seed = seed.to(tl.int64)  # a small one comes with 32 bits
    if tl.load(skip) == 0:
        T: tl.constexpr = tl.float64 if PARAM_FORMAT == FLOAT64 else tl.float32
        entry = tl.load(spans + 2 * tl.program_id(0))
        number = tl.load(spans + 2 * tl.program_id(0) + 1)
        index = entry >> 3
        row = rows + index * WORDS
        out = constants + index * HYPERS
        c = (
            tl.load(out + DECAY).to(T), tl.load(out + INTO).to(T), tl.load(out + MOMENT_DECAY).to(T),
            tl.load(out + NEG_OUT).to(T),
        )  # fmt: skip
        _span(
            entry & 7, row, shapes + index * SHAPE_SIZE, number, tl.load(factors + index).to(T),
            tl.load(out + LIMIT).to(T), c, tl.load(row + GROUP) >> 32, tl.load(steps + index).to(tl.int64), seed,
            True, PARAM_FORMAT, GRAD_FORMAT, MASTER_FORMAT, STATE_FORMATS, STATES, STOCHASTIC,
        )  # fmt: skip
