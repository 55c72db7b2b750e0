"""Kernels of max pooling and what launches them; a thread gathers what its element depends on, without atomics.

Codes lie in logical order, as in the PyTorch operators; tensors are read and written by their strides.
"""

# A type checker knows neither constexpr arguments nor what stands for a tensor within a kernel.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportRedeclaration=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2a_cli.activations.kernels.tiles import load_codes_at, store_codes
from s2a_cli.activations.ops.pooling import output_like, window_bits
from s2a_cli.activations.quant.packing import packed_size
from s2a_cli.activations.quant.primitives import PLAIN

BLOCK, LARGEST = 512, 32  # elements a program; places of a window for which loops are unrolled
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _coordinates(index, channels, height, width):
    """Returns sample, channel, row and column of the element `index`, int32, in logical order."""
    column = index % width
    index = index // width
    row = index % height
    index = index // height
    return (index // channels).to(tl.int64), (index % channels).to(tl.int64), row, column


@triton.jit
def pool(
    x,
    out,
    packed,
    total,
    channels,
    height,
    width,
    rows,
    columns,
    x_sample,
    x_channel,
    x_row,
    x_column,
    out_sample,
    out_channel,
    out_row,
    out_column,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores the maximum of each window of x [., channels, height, width], and its place in the window.

    out: [., channels, rows, columns].
    """
    first = tl.program_id(0) * BLOCK
    index = first + tl.arange(0, BLOCK)
    held = index < total
    sample, channel, row, column = _coordinates(index, channels, rows, columns)
    plane = x + sample * x_sample + channel * x_channel
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    codes = tl.full([BLOCK], -1, tl.int32)
    for place in tl.static_range(KH * KW):
        i = row * SH - PH + place // KW * DH
        j = column * SW - PW + place % KW * DW
        inside = held & (i >= 0) & (i < height) & (j >= 0) & (j < width)
        value = tl.load(plane + i * x_row + j * x_column, inside, other=0).to(tl.float32)
        better = inside & (
            (value > best) | (value != value) | (codes < 0)
        )  # as stock: the first of several, the last NaN
        best = tl.where(better, value, best)
        codes = tl.where(better, place, codes)
    where = out + sample * out_sample + channel * out_channel + row * out_row + column * out_column
    tl.store(where, best.to(out.dtype.element_ty), held)
    codes = tl.where(held, codes, 0)[None, :]
    store_codes(packed, codes, tl.program_id(0).to(tl.int64), (total - first).to(tl.int64), BLOCK, BITS, False)


@triton.jit
def pool_backward(
    grad,
    out,
    packed,
    total,
    windows,
    channels,
    height,
    width,
    rows,
    columns,
    grad_sample,
    grad_channel,
    grad_row,
    grad_column,
    out_sample,
    out_channel,
    out_row,
    out_column,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores the sum of the gradients of all windows whose maximum an element is.

    out: [., channels, height, width].
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = index < total
    sample, channel, i, j = _coordinates(index, channels, height, width)
    plane = grad + sample * grad_sample + channel * grad_channel
    before = (sample * channels + channel) * rows * columns
    result = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(KH * KW):
        down, across = i + PH - place // KW * DH, j + PW - place % KW * DW
        row, column = down // SH, across // SW
        inside = held & (down >= 0) & (across >= 0) & (row * SH == down) & (column * SW == across)
        inside &= (row < rows) & (column < columns)
        code = load_codes_at(packed, tl.zeros([], tl.int64), before + row * columns + column, inside, windows, BITS)
        chosen = inside & (code == place)
        result += tl.load(plane + row * grad_row + column * grad_column, chosen, other=0).to(tl.float32)
    where = out + sample * out_sample + channel * out_channel + i * out_row + j * out_column
    tl.store(where, result.to(out.dtype.element_ty), held)


def _covers(x: Tensor, kernel: list[int], *sizes: int) -> bool:
    return x.dtype in FLOATS and x.numel() > 0 and max(sizes) < 2**30 and math.prod(kernel) <= LARGEST


def max_pool2d(x: Tensor, kernel, stride, padding, dilation, ceil_mode) -> tuple[Tensor, Tensor]:
    """Falls back to PyTorch for float64, windows of more than 32 places, and 2^30 elements or more."""
    out = output_like(x, kernel, stride, padding, dilation, ceil_mode)
    if not _covers(x, kernel, x.numel(), out.numel()) or out.numel() == 0:
        return PLAIN["max_pool2d"](x, kernel, stride, padding, dilation, ceil_mode)
    bits = window_bits(kernel)
    packed = x.new_empty(packed_size(out.numel(), bits), dtype=torch.uint8)
    sizes = out.numel(), *x.shape[1:], *out.shape[2:], *x.stride(), *out.stride()
    window = *kernel, *stride, *padding, *dilation, bits, BLOCK
    pool[triton.cdiv(out.numel(), BLOCK),](x, out, packed, *sizes, *window, num_warps=4)
    return out, packed


def max_pool2d_backward(grad: Tensor, packed: Tensor, size, kernel, stride, padding, dilation, ceil_mode) -> Tensor:
    """Falls back to PyTorch as max_pool2d does."""
    last = grad.is_contiguous(memory_format=torch.channels_last) and not grad.is_contiguous()
    out = grad.new_empty(size).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    if not _covers(grad, kernel, grad.numel(), out.numel()):
        return PLAIN["max_pool2d_backward"](grad, packed, size, kernel, stride, padding, dilation, ceil_mode)
    sizes = out.numel(), grad.numel(), *out.shape[1:], *grad.shape[2:], *grad.stride(), *out.stride()
    window = *kernel, *stride, *padding, *dilation, window_bits(kernel), BLOCK
    pool_backward[triton.cdiv(out.numel(), BLOCK),](grad, out, packed, *sizes, *window, num_warps=4)
    return out
