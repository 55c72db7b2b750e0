"""The table of operators: how each is called, and the bytes that it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from s2a_cli.activations.ops.pointwise import keep_codes
from s2a_cli.activations.ops.registry import HANDLERS
from s2a_cli.activations.quant.packing import groupwise_size, packed_size
from s2a_cli.config.schema import QuantConfig


def config(bits: int, linear: int | None = None, group: int = 64) -> QuantConfig:
    families = dict.fromkeys(("pointwise", "norm", "attention", "softmax"), bits)
    return QuantConfig(name="test", **families, linear=linear, group=group)


@dataclass
class Case:
    """`run` of inputs of these shapes; those named in `frozen` need no gradient."""

    name: str
    run: Callable[..., Tensor]
    shapes: list[tuple[int, ...]]
    kept: Callable[[int], int] | None = None  # bytes at b bits, parameters and masks apart
    exact: bool = False
    frozen: tuple[int, ...] = ()
    linear: bool = False


def pointwise(shape: tuple[int, ...]) -> Callable[[int], int]:
    return lambda bits: packed_size(torch.Size(shape).numel(), bits)


def one_bit(shape: tuple[int, ...]) -> Callable[[int], int]:
    return lambda bits: packed_size(torch.Size(shape).numel(), 1)


def normalised(rows: int, width: int) -> Callable[[int], int]:
    return lambda bits: groupwise_size(rows, width, 64, bits) + 4 * rows


X = (3, 7, 11)
IMAGE = (2, 6, 9, 10)
HEADS = (2, 3, 10, 16)


def nothing(bits: int) -> int:
    return 0


def batch_norm(x: Tensor, mean: Tensor, variance: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance.abs(), w, b, False, 0.1, 1e-5)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.25).softmax(-1) @ v


def normalised_map(x: Tensor) -> Tensor:
    p = x.softmax(-1) * 1
    p /= p.sum(-1).unsqueeze(-1) + 1
    return p


def multiplied_by_itself(x: Tensor) -> Tensor:
    return x * x


POWERS = {
    "square": torch.square,
    "Tensor.square": Tensor.square,
    "power": lambda x: x**2,
    "Tensor.pow": lambda x: x.pow(3),
    "torch.pow": lambda x: torch.pow(x, exponent=2),
}

CASES = [
    *(Case(f.__name__, f, [X], pointwise(X)) for f in (F.gelu, F.silu, F.mish, F.hardswish, F.elu, F.celu, F.selu)),
    *(Case(f.__name__, f, [X], pointwise(X)) for f in (torch.sigmoid, torch.tanh, F.softplus, F.logsigmoid)),
    Case("Tensor.sigmoid", Tensor.sigmoid, [X], pointwise(X)),
    Case("gelu-tanh", partial(F.gelu, approximate="tanh"), [X], pointwise(X)),
    Case("elu-alpha", lambda x: F.elu(x, 0.7), [X], pointwise(X)),
    Case("gelu-0d", F.gelu, [()], pointwise(())),
    Case("gelu-empty", F.gelu, [(0, 4)], nothing),
    *(
        Case(f.__name__, f, [X], one_bit(X), exact=True)
        for f in (F.relu, F.relu6, F.hardtanh, F.hardsigmoid, F.leaky_relu)
    ),
    Case("Tensor.relu", Tensor.relu, [X], one_bit(X), exact=True),
    Case("hardtanh-bounds", lambda x: F.hardtanh(x, -0.2, 0.7), [X], one_bit(X), exact=True),
    Case("leaky-slope", lambda x: F.leaky_relu(x, negative_slope=0.3), [X], one_bit(X), exact=True),
    Case("layer_norm", lambda x, w, b: F.layer_norm(x, X[-1:], w, b), [X, X[-1:], X[-1:]], normalised(21, 11)),
    Case("layer_norm-two", lambda x, w, b: F.layer_norm(x, X[1:], w, b), [X, X[1:], X[1:]], normalised(3, 77)),
    Case("layer_norm-plain", lambda x: F.layer_norm(x, (11,)), [X], normalised(21, 11)),
    Case(
        "layer_norm-frozen",
        lambda x, w, b: F.layer_norm(x, (11,), w, b),
        [X, (11,), (11,)],
        normalised(21, 11),
        frozen=(1,),
    ),
    Case(
        "layer_norm-bias", lambda x, w, b: F.layer_norm(x, (11,), w, b), [X, (11,), (11,)], nothing, True, frozen=(0, 1)
    ),
    Case("layer_norm-empty", lambda x, w, b: F.layer_norm(x, (11,), w, b), [(0, 11), (11,), (11,)], nothing),
    Case("layer_norm-wide", lambda x, w: F.layer_norm(x, (100,), w), [(9, 100), (100,)], normalised(9, 100)),
    Case("rms_norm", lambda x, w: F.rms_norm(x, (11,), w, 1e-6), [X, (11,)], normalised(21, 11)),
    Case("rms_norm-plain", lambda x: F.rms_norm(x, (11,), eps=1e-6), [X], normalised(21, 11)),
    Case("group_norm", lambda x, w, b: F.group_norm(x, 3, w, b), [IMAGE, (6,), (6,)], normalised(6, 180)),
    Case("group_norm-plain", lambda x: F.group_norm(x, 6), [IMAGE], normalised(12, 90)),
    Case(
        "group_norm-pooled",  # as many elements a group as channels
        lambda x, w, b: F.group_norm(x, 3, w, b),
        [(2, 12, 1, 1), (12,), (12,)],
        normalised(6, 4),
    ),
    Case(
        "group_norm-bias",
        lambda x, w, b: F.group_norm(x, 3, w, b),
        [(2, 12, 1, 1), (12,), (12,)],
        nothing,
        True,
        frozen=(0, 1),
    ),
    Case("batch_norm", batch_norm, [IMAGE, *[(6,)] * 4], lambda b: 24, True, frozen=(1, 2, 3)),  # the variance
    Case("conv2d", F.conv2d, [IMAGE, (4, 6, 3, 3), (4,)], nothing, True, frozen=(1,)),
    Case("conv2d-stride", partial(F.conv2d, stride=2, padding=1), [IMAGE, (4, 6, 3, 3)], nothing, True, frozen=(1,)),
    Case(
        "conv2d-same", partial(F.conv2d, padding="same", dilation=2), [IMAGE, (4, 6, 3, 3)], nothing, True, frozen=(1,)
    ),
    Case(
        "conv2d-depthwise",
        partial(F.conv2d, groups=6, stride=(2, 1)),
        [IMAGE, (6, 1, 3, 2)],
        nothing,
        True,
        frozen=(1,),
    ),
    Case("conv2d-bias-only", F.conv2d, [IMAGE, (4, 6, 3, 3), (4,)], nothing, True, frozen=(0, 1)),
    Case("conv1d", lambda x, w: F.conv1d(x, w, None, 2), [(2, 6, 11), (4, 6, 3)], nothing, True, frozen=(1,)),
    Case("max_pool2d", lambda x: F.max_pool2d(x, 3, 2, 1), [IMAGE], lambda b: packed_size(2 * 6 * 5 * 5, 4), True),
    Case("max_pool2d-dilated", lambda x: F.max_pool2d(x, (3, 2), 1, 1, (2, 3)), [IMAGE], exact=True),
    Case("max_pool2d-ceil", lambda x: F.max_pool2d(x, 2, ceil_mode=True), [IMAGE], exact=True),
    Case("max_pool2d-large", lambda x: F.max_pool2d(x, 9), [IMAGE], lambda b: packed_size(12, 7), True),
    Case("max_pool2d-empty", lambda x: F.max_pool2d(x, 2), [(0, 3, 4, 4)], nothing, True),
    Case("avg_pool2d", lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), [IMAGE], nothing, True),
    Case("softmax", lambda x: F.softmax(x, -1), [X], lambda b: groupwise_size(21, 11, 64, b)),
    Case("Tensor.softmax", lambda x: x.softmax(dim=2), [X], lambda b: groupwise_size(21, 11, 64, b)),
    Case("softmax-wide", lambda x: torch.softmax(x, 1), [(5, 130)], lambda b: groupwise_size(5, 130, 64, b)),
    Case("softmax-other-dim", lambda x: F.softmax(x, 1), [X], lambda b: groupwise_size(33, 7, 64, b)),
    Case("softmax-empty", lambda x: F.softmax(x, 1), [(0, 4)], nothing),
    Case("attention", F.scaled_dot_product_attention, [HEADS] * 3, lambda b: 3 * groupwise_size(60, 16, 64, b)),
    Case("attention-causal", partial(F.scaled_dot_product_attention, is_causal=True), [HEADS] * 3),
    Case("attention-cross", F.scaled_dot_product_attention, [HEADS, (2, 3, 7, 16), (2, 3, 7, 20)]),
    Case("attention-3d", F.scaled_dot_product_attention, [(3, 5, 8)] * 3),
    Case("attention-2d", F.scaled_dot_product_attention, [(5, 8)] * 3, exact=True),
    Case("attention-mask", masked, [HEADS] * 3 + [(1, 3, 10, 10)]),
    Case("attention-mask-each", masked, [HEADS] * 3 + [(2, 1, 10, 10)]),
    Case("attention-mask-frozen", masked, [HEADS] * 3 + [(10, 10)], frozen=(3,)),
    Case(
        "attention-gqa",
        partial(F.scaled_dot_product_attention, enable_gqa=True),
        [(2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)],
    ),
    Case("attention-empty", F.scaled_dot_product_attention, [(0, 3, 10, 16)] * 3, nothing),
    Case(
        "attention-unfused",
        unfused,
        [HEADS] * 3,
        lambda b: 3 * groupwise_size(60, 16, 64, b) + groupwise_size(60, 10, 64, b),
    ),
    Case("gate", lambda x, g: (x * 1) * g.sigmoid(), [IMAGE, (2, 6, 1, 1)]),
    Case(
        "gate-full",
        lambda x, g: F.silu(g) * (x * 1),
        [X, X],
        lambda b: 2 * groupwise_size(21, 11, 64, b) + packed_size(231, b),
    ),
    Case("gate-both-broadcast", lambda x, g: (x * 1) * (g * 1), [(2, 6, 1, 5), (2, 1, 4, 5)], exact=True),
    Case("square-of-itself", lambda x: multiplied_by_itself(x * 1), [X], lambda b: groupwise_size(21, 11, 64, b)),
    *(Case(name, lambda x, f=f: f(x * 1), [X], lambda b: groupwise_size(21, 11, 64, b)) for name, f in POWERS.items()),
    Case("power-of-1.5", lambda x: (x * 1).abs() ** 1.5, [X], exact=True),
    Case("divide", lambda x, n: (x * 1) / n.exp(), [HEADS, (2, 3, 10, 1)]),
    Case("divide-in-place", lambda x, n: (x * 1).div_(n.exp()), [HEADS, (2, 1, 1, 16)]),
    Case("divide-in-place-operator", normalised_map, [HEADS]),
    Case("divide-both", lambda x, n: (x * 1) / n.exp(), [X, X]),
    Case("divide-constant", lambda x, n: (x * 1) / n.exp(), [X, X], exact=True, frozen=(1,)),
    Case("norm-all", lambda x: (x * 1).norm(), [X]),
    Case("norm-dims", lambda x: (x * 1).norm(p=2, dim=(2, 3), keepdim=True), [IMAGE]),
    Case("norm-torch", lambda x: torch.norm(x * 1, 2, -1), [X]),
    Case("norm-1", lambda x: (x * 1).norm(p=1, dim=1), [X], exact=True),
    Case("vector_norm", lambda x: torch.linalg.vector_norm(x * 1, 2, (0, 2)), [X]),
    Case("normalize", lambda x: F.normalize(x, dim=-1), [X], normalised(21, 11)),
    Case("normalize-other-dim", lambda x: F.normalize(x, dim=1), [IMAGE], normalised(180, 6)),
    Case("normalize-1", lambda x: F.normalize(x, 1.0), [X], exact=True),
    Case("amax", lambda x: (x * 1).amax(dim=1), [HEADS], lambda b: packed_size(960, 1), True),
    Case("amax-all", lambda x: torch.amax(x * 1, (0, 2)), [X], lambda b: packed_size(231, 1), True),
    Case("amax-ties", lambda x: torch.relu(x).amax(dim=-1, keepdim=True), [X], exact=True),
    Case("amin", lambda x: (x * 1).amin((1, 2)), [X], lambda b: packed_size(231, 1), True),
    Case("conv_transpose2d", F.conv_transpose2d, [IMAGE, (6, 4, 3, 3), (4,)], nothing, True, frozen=(1,)),
    Case(
        "conv_transpose2d-stride",
        partial(F.conv_transpose2d, stride=2, padding=1, output_padding=1, groups=2),
        [IMAGE, (6, 4, 3, 3)],
        nothing,
        True,
        frozen=(1,),
    ),
    Case(
        "conv_transpose1d",
        lambda x, w: F.conv_transpose1d(x, w, None, 3),
        [(2, 6, 5), (6, 4, 2)],
        nothing,
        True,
        frozen=(1,),
    ),
    Case("pad-reflect", lambda x: F.pad(x, (1, 2, 1, 0), "reflect"), [IMAGE], nothing, True),
    Case("pad-replicate", lambda x: F.pad(x, (1, 2, 1, 0), mode="replicate"), [IMAGE], nothing, True),
    Case("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (4, 3)), [IMAGE], nothing, True),
    Case("linear-coded", F.linear, [X, (5, 11), (5,)], lambda b: groupwise_size(21, 11, 64, b), linear=True),
    Case("conv2d-coded", F.conv2d, [IMAGE, (4, 6, 3, 3), (4,)], linear=True),
    Case("conv2d-trains", F.conv2d, [IMAGE, (4, 6, 3, 3), (4,)], exact=True),
    Case("silu-twice", lambda x: F.silu(x) + F.silu(x), [X], lambda b: 2 * packed_size(231, b)),
]
NAMED = {case.name for case in CASES}
CASES += [  # functions of one tensor that a file of their own registers: in no table, and tested all the same
    Case(f.__name__, f, [X], pointwise(X) if handler.bits == ("pointwise",) else one_bit(X), handler.bits == (None,))
    for f, handler in HANDLERS.items()
    if handler.run.__module__ == keep_codes.__module__ and f.__name__ not in NAMED and not f.__name__.endswith("_")
]
