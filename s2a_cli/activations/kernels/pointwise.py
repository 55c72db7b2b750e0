"""Elementwise kernels, on a tensor that is read as rows of BLOCK elements."""

# A type checker knows neither constexpr arguments nor what stands for a tensor within a kernel.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportRedeclaration=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import os

import triton
import triton.language as tl

from s2a_cli.activations.kernels.tiles import assign, load_codes, place, store_codes

if os.environ.get("TRITON_INTERPRET") == "1":  # which cannot call CUDA's library

    @triton.jit
    def exp(x):
        return tl.exp(x)

    @triton.jit
    def tanh(x):
        return 2 / (1 + tl.exp(-2 * x)) - 1

else:  # what PyTorch's own kernels call
    from triton.language.extra.libdevice import exp, tanh


@triton.jit
def activation(x, FUNCTION: tl.constexpr):
    """Returns FUNCTION of float32 x, in the order of operations of PyTorch's kernels."""
    if FUNCTION == "gelu":
        return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * (x * x * x))
        return 0.5 * x * (1.0 + tanh(inner))
    elif FUNCTION == "silu":
        return tl.div_rn(x, 1.0 + exp(-x))
    else:
        tl.static_assert(FUNCTION == "hardswish")
        return x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) * 0.16666666666666666


@triton.jit
def encode(
    x,
    y,
    packed,
    bin_codes,
    total,
    step,
    shift,
    FUNCTION: tl.constexpr,
    BINS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Quantizes x; with FUNCTION also stores y = FUNCTION(x)."""
    first = tl.program_id(0).to(tl.int64)
    rest = total - first * BLOCK
    where, valid = place(x, first, BLOCK, rest, 1, BLOCK)
    values = tl.load(where, valid, other=0).to(tl.float32)
    if FUNCTION is not None:
        where, valid = place(y, first, BLOCK, rest, 1, BLOCK)
        tl.store(where, activation(values, FUNCTION).to(y.dtype.element_ty), valid)
    codes = tl.where(valid, assign(values, bin_codes, step, shift, BINS), 0)
    store_codes(packed, codes, first, rest, BLOCK, BITS, EVEN)


@triton.jit
def interval(x, packed, total, low, high, BOUNDED: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Stores one bit an element: low < x, and x < high where it is BOUNDED."""
    first = tl.program_id(0).to(tl.int64)
    rest = total - first * BLOCK
    where, valid = place(x, first, BLOCK, rest, 1, BLOCK)
    values = tl.load(where, valid, other=0).to(tl.float32)
    inside = valid & (values > low)
    if BOUNDED:
        inside &= values < high
    store_codes(packed, inside.to(tl.int32), first, rest, BLOCK, 1, EVEN)


@triton.jit
def multiply(grad, out, packed, entries, total, BITS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Stores grad * entries[code]."""
    first = tl.program_id(0).to(tl.int64)
    rest = total - first * BLOCK
    where, valid = place(grad, first, BLOCK, rest, 1, BLOCK)
    factor = tl.load(entries + load_codes(packed, first, rest, BLOCK, BITS, EVEN, 1, BLOCK)).to(tl.float32)
    product = tl.load(where, valid, other=0).to(tl.float32) * factor
    where, valid = place(out, first, BLOCK, rest, 1, BLOCK)
    tl.store(where, product.to(out.dtype.element_ty), valid)
