"""Quantizes and dequantizes rows with a scale a group; a tile holds ROWS rows of WIDTH elements, a multiple of 8.

A row of up to 1024 elements is one warp's, so that nothing goes through shared memory but packed codes. Codebooks are
read where the elements lie, in the shape of the tile: another shape would move all codes between threads.
"""

# A type checker knows neither constexpr arguments nor what stands for a tensor within a kernel.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportRedeclaration=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from s2a_cli.activations.kernels.tiles import assign, load_codes, place, reciprocal, store_codes


@triton.jit
def _row(pointer, row: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, other: tl.constexpr):
    """Returns a row of a tensor [n, WIDTH] as float32, ROWS times: [ROWS, COLS]."""
    col = tl.broadcast_to(tl.arange(0, COLS)[None, :], [ROWS, COLS])
    return tl.load(pointer + row * WIDTH + col, col < WIDTH, other=other).to(tl.float32)


@triton.jit
def bfloat16(x):
    """Rounds float32 to what bfloat16 holds, ties to even: on integers, so on every device."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def largest(x, SIGNED: tl.constexpr):
    """Returns the largest of x [., ., GROUP] in each group; SIGNED: in magnitude, and of two alike the negative one."""
    if SIGNED:  # a magnitude before its sign is ordered as an integer
        bits = x.to(tl.uint32, bitcast=True)
        most = tl.max((bits << 1) | (bits >> 31), 2)
        return ((most >> 1) | (most << 31)).to(tl.float32, bitcast=True)
    return tl.max(x, 2)


@triton.jit
def inverse(scale):
    """Returns 1 / scale, and 0 where that is not finite."""
    factor = reciprocal(scale)
    return tl.where(tl.abs(factor) < float("inf"), factor, 0.0)


@triton.jit
def _quantize_rows(
    x,
    packed,
    scales,
    bin_codes,
    first,
    rest,
    step,
    shift,
    SIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BINS: tl.constexpr,
    BITS: tl.constexpr,
):
    """Does what primitives.quantize_rows does, to float32 x [ROWS, COLS], which is 0 beyond WIDTH."""
    ROWS: tl.constexpr = x.shape[0]
    COLS: tl.constexpr = x.shape[1]
    STRIDE: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    x = tl.reshape(x, [ROWS, COLS // GROUP, GROUP])
    scale = bfloat16(largest(x, SIGNED))
    where, held = place(scales, first, STRIDE, rest // WIDTH * STRIDE, ROWS, COLS // GROUP)
    tl.store(where, scale.to(tl.bfloat16), held)
    x = tl.reshape(x * inverse(scale)[:, :, None], [ROWS, COLS])
    store_codes(packed, assign(x, bin_codes, step, shift, BINS), first, rest, WIDTH, BITS, True)


@triton.jit
def _dequantize_rows(
    packed,
    scales,
    entries,
    channels,
    first,
    rest,
    CALIBRATED: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Returns what primitives.dequantize_rows does: float32 [ROWS, COLS]."""
    STRIDE: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    codes = load_codes(packed, first, rest, WIDTH, BITS, True, ROWS, COLS)
    where, held = place(scales, first, STRIDE, rest // WIDTH * STRIDE, ROWS, COLS // GROUP)
    scale = tl.load(where, held, other=0).to(tl.float32)
    values = tl.reshape(tl.load(entries + codes).to(tl.float32), [ROWS, COLS // GROUP, GROUP])
    values = tl.reshape(values * scale[:, :, None], [ROWS, COLS])
    if CALIBRATED:
        values = _row(channels, 0, WIDTH, ROWS, COLS, 0) + values * _row(channels, 1, WIDTH, ROWS, COLS, 0)
    return values


@triton.jit
def encode(
    x,
    packed,
    scales,
    rstd,
    bin_codes,
    channels,
    rows,
    eps,
    step,
    shift,
    inner,
    middle,
    near,
    far,
    outer,
    STRIDED: tl.constexpr,
    NORM: tl.constexpr,
    SIGNED: tl.constexpr,
    CALIBRATED: tl.constexpr,
    BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EACH: tl.constexpr,
):
    """Quantizes x, or with NORM ("layer" or "rms") x normalised, and then stores rstd. A program makes EACH tiles.

    STRIDED: row r is at (r % inner) * near + (r // inner % middle) * far + r // (inner * middle) * outer.
    """
    for tile in range(EACH):
        first = (tl.program_id(0).to(tl.int64) * EACH + tile) * ROWS
        rest = (rows - first) * WIDTH
        where, valid = place(x, first, WIDTH, rest, ROWS, COLS)
        if STRIDED:
            row = first.to(tl.int32) + tl.arange(0, ROWS)[:, None]
            start = (row // inner // middle).to(tl.int64) * outer + row // inner % middle * far + row % inner * near
            where = x + start + tl.arange(0, COLS)[None, :]
        values = tl.load(where, valid, other=0).to(tl.float32)
        if NORM is not None:
            if NORM == "layer":
                mean = tl.sum(values, 1, keep_dims=True) / WIDTH
                values = tl.where(valid, values - mean, 0.0)
            factor = tl.rsqrt(tl.sum(values * values, 1, keep_dims=True) / WIDTH + eps)
            values *= factor
            where, held = place(rstd, first, 1, rest // WIDTH, ROWS, 1)
            tl.store(where, factor, held)
        if CALIBRATED:
            values = (values - _row(channels, 0, WIDTH, ROWS, COLS, 0)) * _row(channels, 2, WIDTH, ROWS, COLS, 0)
        _quantize_rows(values, packed, scales, bin_codes, first, rest, step, shift, SIGNED, WIDTH, GROUP, BINS, BITS)


@triton.jit
def decode(
    out,
    packed,
    scales,
    entries,
    channels,
    rows,
    start,
    stop,
    CALIBRATED: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EACH: tl.constexpr,
):
    """Dequantizes the rows start:stop of `rows`."""
    for tile in range(EACH):
        own = (tl.program_id(0).to(tl.int64) * EACH + tile) * ROWS
        first = own + start
        rest = (rows - first) * WIDTH
        values = _dequantize_rows(
            packed, scales, entries, channels, first, rest, CALIBRATED, WIDTH, GROUP, BITS, ROWS, COLS
        )
        where, valid = place(out, own, WIDTH, (stop - first) * WIDTH, ROWS, COLS)
        tl.store(where, values.to(out.dtype.element_ty), valid)


@triton.jit
def norm_backward(
    grad,
    out,
    sums,
    packed,
    scales,
    rstd,
    entries,
    weight,
    channels,
    rows,
    CENTRE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CALIBRATED: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Stores the gradient of x and, summed over the rows of each program, those of weight and bias.

    sums: [2, programs, WIDTH].
    """
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        first = tile * ROWS
        rest = (rows - first) * WIDTH
        where, valid = place(grad, first, WIDTH, rest, ROWS, COLS)
        g = tl.load(where, valid, other=0).to(tl.float32)
        x = _dequantize_rows(packed, scales, entries, channels, first, rest, CALIBRATED, WIDTH, GROUP, BITS, ROWS, COLS)
        dweight += g * x
        dbias += g
        if WEIGHTED:
            g *= _row(weight, 0, WIDTH, ROWS, COLS, 0)
        dx = g - x * (tl.sum(g * x, 1, keep_dims=True) / WIDTH)
        if CENTRE:
            dx -= tl.sum(g, 1, keep_dims=True) / WIDTH
        where, held = place(rstd, first, 1, rest // WIDTH, ROWS, 1)
        dx *= tl.load(where, held, other=0)
        where, valid = place(out, first, WIDTH, rest, ROWS, COLS)
        tl.store(where, dx.to(out.dtype.element_ty), valid)
    col = tl.arange(0, COLS)
    sums += tl.program_id(0) * WIDTH + col
    tl.store(sums, tl.sum(dweight, 0), col < WIDTH)
    tl.store(sums + tl.num_programs(0) * WIDTH, tl.sum(dbias, 0), col < WIDTH)
