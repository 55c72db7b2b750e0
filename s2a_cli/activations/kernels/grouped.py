"""Kernels of rows that are coded with a scale a group: ROWS rows of WIDTH elements, a multiple of 8, a program."""

import triton
import triton.language as tl

from s2a_cli.activations.kernels.tiles import assign, load_codes, place, store_codes


@triton.jit
def _row(pointer, row: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr, other: tl.constexpr):
    """A row of a tensor [n, WIDTH] as float32 [1, COLS]."""
    col = tl.arange(0, COLS)[None, :]
    return tl.load(pointer + row * WIDTH + col, col < WIDTH, other=other).to(tl.float32)


@triton.jit
def _bfloat16(x):
    """float32 rounded to what bfloat16 holds, ties to even: on integers, so on every device."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _encode_rows(
    x,
    valid,
    packed,
    scales,
    bins,
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
    """As operators.encode_rows, of float32 x [ROWS, COLS], which is 0 beyond WIDTH. A NaN leaves no trace in the scale."""
    ROWS: tl.constexpr = x.shape[0]
    COLS: tl.constexpr = x.shape[1]
    STRIDE: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    x = tl.reshape(x, [ROWS, COLS // GROUP, GROUP])
    scale = tl.max(x, 2)
    if SIGNED:
        least = tl.min(x, 2)
        scale = tl.where(scale > -least, scale, least)
    scale = _bfloat16(scale)
    where, held = place(scales, first, STRIDE, rest // WIDTH * STRIDE, ROWS, COLS // GROUP)
    tl.store(where, scale.to(tl.bfloat16), held)
    factor = tl.div_rn(1.0, scale)
    factor = tl.where(tl.abs(factor) < float("inf"), factor, 0.0)
    codes = assign(x * factor[:, :, None], bins, step, shift, BINS)
    codes = tl.where(valid, tl.reshape(codes, [ROWS, COLS]), 0)
    store_codes(packed, codes, first, rest, WIDTH, BITS, True)


@triton.jit
def _decode_rows(
    packed,
    scales,
    levels,
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
    """As operators.decode_rows: float32 [ROWS, COLS]."""
    STRIDE: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    codes = load_codes(packed, first, rest, WIDTH, BITS, True, ROWS, COLS)
    where, held = place(scales, first, STRIDE, rest // WIDTH * STRIDE, ROWS, COLS // GROUP)
    scale = tl.load(where, held, other=0).to(tl.float32)
    values = tl.load(levels + tl.reshape(codes, [ROWS, COLS // GROUP, GROUP])).to(tl.float32) * scale[:, :, None]
    values = tl.reshape(values, [ROWS, COLS])
    if CALIBRATED:
        values = _row(channels, 0, WIDTH, COLS, 0) + values * _row(channels, 1, WIDTH, COLS, 0)
    return values


@triton.jit
def encode(
    x,
    packed,
    scales,
    rstd,
    bins,
    channels,
    rows,
    eps,
    step,
    shift,
    NORM: tl.constexpr,
    SIGNED: tl.constexpr,
    CALIBRATED: tl.constexpr,
    BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Codes and scales of x; with NORM ("layer" or "rms") of x normalised, and rstd."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    rest = (rows - first) * WIDTH
    where, valid = place(x, first, WIDTH, rest, ROWS, COLS)
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
        values = tl.div_rn(values - _row(channels, 0, WIDTH, COLS, 0), _row(channels, 1, WIDTH, COLS, 1))
    _encode_rows(values, valid, packed, scales, bins, first, rest, step, shift, SIGNED, WIDTH, GROUP, BINS, BITS)


@triton.jit
def decode(
    out,
    packed,
    scales,
    levels,
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
):
    """The rows start:stop of `rows`."""
    own = tl.program_id(0).to(tl.int64) * ROWS
    first = own + start
    rest = (rows - first) * WIDTH
    values = _decode_rows(packed, scales, levels, channels, first, rest, CALIBRATED, WIDTH, GROUP, BITS, ROWS, COLS)
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
    levels,
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
    """Gradients of x and, summed over the rows of each program, of weight and bias: sums [2, programs, WIDTH]."""
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        first = tile * ROWS
        rest = (rows - first) * WIDTH
        where, valid = place(grad, first, WIDTH, rest, ROWS, COLS)
        g = tl.load(where, valid, other=0).to(tl.float32)
        x = _decode_rows(packed, scales, levels, channels, first, rest, CALIBRATED, WIDTH, GROUP, BITS, ROWS, COLS)
        dweight += g * x
        dbias += g
        if WEIGHTED:
            g *= _row(weight, 0, WIDTH, COLS, 0)
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
