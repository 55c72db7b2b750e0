"""Quantizes and dequantizes rows of any width, such as maps of 197 or 49 keys: codes may begin within a byte."""

# A type checker knows neither constexpr arguments nor what stands for a tensor within a kernel.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportRedeclaration=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from s2a_cli.activations.kernels.grouped import bfloat16, inverse, largest
from s2a_cli.activations.kernels.tiles import assign, load_codes, load_codes_at, place, store_codes


@triton.jit
def encode(
    x,
    packed,
    scales,
    bin_codes,
    rows,
    step,
    shift,
    SIGNED: tl.constexpr,
    BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Quantizes x.

    ROWS is a multiple of 8, so that a program's codes are whole bytes; FLAT >= ROWS * WIDTH.
    """
    GROUPS: tl.constexpr = COLS // GROUP
    STRIDE: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    first = tl.program_id(0).to(tl.int64) * ROWS
    rest = (rows - first) * WIDTH
    where, valid = place(x, first, WIDTH, rest, ROWS, COLS)
    values = tl.load(where, valid, other=0).to(tl.float32)
    scale = bfloat16(largest(tl.reshape(values, [ROWS, GROUPS, GROUP]), SIGNED))
    where, held = place(scales, first, STRIDE, rest // WIDTH * STRIDE, ROWS, GROUPS)
    tl.store(where, scale.to(tl.bfloat16), held)
    factor = tl.reshape(inverse(scale), [ROWS * GROUPS])
    # Once more, as one row: what shares a byte lies in one thread.
    index = tl.arange(0, FLAT)
    row = index // WIDTH
    valid = (index < ROWS * WIDTH) & (index < rest)
    values = tl.load(x + first * WIDTH + index, valid, other=0).to(tl.float32)
    own = tl.minimum(row * GROUPS + (index - row * WIDTH) // GROUP, ROWS * GROUPS - 1)
    codes = tl.where(valid, assign(values * tl.gather(factor, own, 0), bin_codes, step, shift, BINS), 0)
    store_codes(packed, codes[None, :], tl.program_id(0).to(tl.int64), rest, ROWS * WIDTH, BITS, False)


@triton.jit
def decode(
    out,
    packed,
    scales,
    entries,
    channels,
    total,
    start,
    stop,
    CALIBRATED: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Dequantizes the elements start:stop of `total`."""
    STRIDE: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    tile = start // BLOCK + tl.program_id(0)
    first = tile * BLOCK
    row = first // WIDTH
    col = (first - row * WIDTH).to(tl.int32) + tl.arange(0, BLOCK)
    down = col // WIDTH
    col -= down * WIDTH
    index = first + tl.arange(0, BLOCK)
    held = (index >= start) & (index < stop)
    codes = tl.reshape(load_codes(packed, tile, total - first, BLOCK, BITS, False, 1, BLOCK), [BLOCK])
    scale = tl.load(scales + row * STRIDE + (down * STRIDE + col // GROUP), held, other=0).to(tl.float32)
    values = tl.load(entries + codes).to(tl.float32) * scale
    if CALIBRATED:
        values = tl.load(channels + col) + values * tl.load(channels + WIDTH + col)
    tl.store(out + (first - start) + tl.arange(0, BLOCK), values.to(out.dtype.element_ty), held)


@triton.jit
def decode_int8(out, codes, scales, total, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Stores codes * scales, GROUP elements a scale."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    held = index < total - first
    own = first // GROUP + ((first % GROUP).to(tl.int32) + index) // GROUP
    values = tl.load(codes + first + index, held, other=0).to(tl.float32) * tl.load(scales + own, held, other=0).to(
        tl.float32
    )
    tl.store(out + first + index, values.to(out.dtype.element_ty), held)


@triton.jit
def softmax_backward(
    grad,
    out,
    packed,
    scales,
    entries,
    rows,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Stores p (grad - sum grad p), where p are the dequantized rows, each divided by its sum."""
    STRIDE: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    first = tl.program_id(0).to(tl.int64) * ROWS
    rest = (rows - first) * WIDTH
    where, valid = place(grad, first, WIDTH, rest, ROWS, COLS)
    g = tl.load(where, valid, other=0).to(tl.float32)
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    codes = load_codes_at(packed, first * WIDTH, row * WIDTH + col, valid, rows * WIDTH, BITS)
    scale = tl.load(scales + first * STRIDE + (row * STRIDE + col // GROUP), valid, other=0).to(tl.float32)
    p = tl.load(entries + codes).to(tl.float32) * scale  # 0 where the scale is
    p *= 1.0 / tl.maximum(tl.sum(p, 1, keep_dims=True), 1.1754943508222875e-38)
    dz = p * (g - tl.sum(g * p, 1, keep_dims=True))
    where, valid = place(out, first, WIDTH, rest, ROWS, COLS)
    tl.store(where, dz.to(out.dtype.element_ty), valid)
