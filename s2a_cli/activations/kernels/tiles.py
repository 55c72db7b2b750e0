"""Helpers that the kernels share: a program handles a tile [ROWS, COLS].

A tile is some rows of WIDTH elements, COLS a power of two >= WIDTH. An elementwise kernel reads its tensor as rows of
COLS = WIDTH elements, the last of which may be short (EVEN: it is not, which lets the compiler use wide loads and
stores). Elsewhere WIDTH is a multiple of 8, so that a row's codes begin a byte in every plane. Offsets within a tile
are int32, that of a tile is int64.
"""

# A type checker knows neither constexpr arguments nor what stands for a tensor within a kernel.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportRedeclaration=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:  # whose tl.fma rounds twice

    @triton.jit
    def reciprocal(x):
        return 1.0 / x

else:

    @triton.jit
    def reciprocal(x):
        """Returns 1 / x of what bfloat16 holds, correctly rounded.

        A Newton step on an approximation takes a fifth of a division's instructions. With 8 bits of x no such quotient
        is as near to halfway between two floats as the step's error.
        """
        near = 1.0 / x
        return tl.fma(near, tl.fma(-x, near, 1.0), near)


@triton.jit
def place(pointer, first, stride: tl.constexpr, rest, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Returns pointers to COLS elements of each row from `first`, and which of them exist: [ROWS, COLS].

    stride: elements between rows.

    rest: elements from the first on.
    """
    col = tl.arange(0, COLS)[None, :]
    offset = tl.arange(0, ROWS)[:, None] * stride + col
    return pointer + first * stride + offset, (col < stride) & (offset < rest)


@triton.jit
def bytes_left(rest, PLANE: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Returns the bytes of a plane that `rest` elements, the last of a tensor, take."""
    if EVEN:  # the same number, of which the compiler knows divisors
        return rest // WIDTH * (WIDTH * PLANE // 8)
    return (rest * PLANE + 7) // 8


@triton.jit
def _store_plane(
    packed, codes, first, rest, WIDTH: tl.constexpr, PLANE: tl.constexpr, LOW: tl.constexpr, EVEN: tl.constexpr
):
    """Stores the bits of codes from LOW on in one plane; returns where the next one begins."""
    ROWS: tl.constexpr = codes.shape[0]
    EACH: tl.constexpr = 8 // PLANE
    BYTES: tl.constexpr = codes.shape[1] // EACH
    part = tl.reshape((codes >> LOW) & ((1 << PLANE) - 1), [ROWS, BYTES, EACH])
    data = tl.sum(part << (PLANE * tl.arange(0, EACH))[None, None, :], 2).to(tl.uint8)
    left = bytes_left(rest, PLANE, WIDTH, EVEN)
    where, valid = place(packed, first, WIDTH * PLANE // 8, left, ROWS, BYTES)
    tl.store(where, data, valid)
    return packed + (first * (WIDTH * PLANE // 8) + left)


@triton.jit
def store_codes(packed, codes, first, rest, WIDTH: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr):
    """Packs int32 codes [ROWS, COLS], 0 where there is no element, as quant/packing.py does."""
    for power in tl.static_range(4):
        if BITS & (8 >> power):  # the planes are the binary digits of BITS, the largest first
            packed = _store_plane(
                packed, codes, first, rest, WIDTH, 8 >> power, BITS // (16 >> power) * (16 >> power), EVEN
            )


@triton.jit
def _load_plane(
    packed,
    first,
    rest,
    WIDTH: tl.constexpr,
    PLANE: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    EACH: tl.constexpr = 8 // PLANE
    left = bytes_left(rest, PLANE, WIDTH, EVEN)
    where, valid = place(packed, first, WIDTH * PLANE // 8, left, ROWS, COLS // EACH)
    data = tl.load(where, valid, other=0).to(tl.int32)
    part = (data[:, :, None] >> (PLANE * tl.arange(0, EACH))[None, None, :]) & ((1 << PLANE) - 1)
    return tl.reshape(part, [ROWS, COLS]), packed + (first * (WIDTH * PLANE // 8) + left)


@triton.jit
def load_codes(
    packed,
    first,
    rest,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Returns what `store_codes` packed: int32 [ROWS, COLS]."""
    codes = tl.zeros([ROWS, COLS], tl.int32)
    for power in tl.static_range(4):
        if BITS & (8 >> power):
            part, packed = _load_plane(packed, first, rest, WIDTH, 8 >> power, EVEN, ROWS, COLS)
            codes |= part << (BITS // (16 >> power) * (16 >> power))
    return codes


@triton.jit
def _load_plane_at(packed, first, index, held, total, PLANE: tl.constexpr):
    """Returns PLANE bits of each code, and where the next plane begins."""
    EACH: tl.constexpr = 8 // PLANE  # codes a byte
    place = (first % EACH).to(tl.int32) + index
    data = tl.load(packed + first // EACH + place // EACH, held, other=0).to(tl.int32)
    part = (data >> (place % EACH * PLANE).to(tl.int32)) & ((1 << PLANE) - 1)
    return part, packed + (total * PLANE + 7) // 8


@triton.jit
def load_codes_at(packed, first, index, held, total, BITS: tl.constexpr):
    """Returns the codes (int32) of the elements first + index of `total`, those that are `held`; first: any int64."""
    codes = tl.zeros(index.shape, tl.int32)
    for power in tl.static_range(4):
        if BITS & (8 >> power):
            part, packed = _load_plane_at(packed, first, index, held, total, 8 >> power)
            codes |= part << (BITS // (16 >> power) * (16 >> power))
    return codes


@triton.jit
def assign(x, bin_codes, step, shift, BINS: tl.constexpr):
    """Returns codes (int32) of float32 x, as primitives.assign does: the bins lie in the L1 cache, 4 or 16 KiB."""
    index = tl.minimum(tl.maximum(x * step + shift, 0.0), BINS - 1.0).to(tl.int32) & (BINS - 1)  # NaN: any
    return tl.load(bin_codes + index).to(tl.int32)
