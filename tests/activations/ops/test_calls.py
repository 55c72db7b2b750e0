"""Every function that is handled, as it can be called: positional, by keyword, with defaults; stock's result to the
bit.
"""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s2a_cli.activations import compress_activations
from s2a_cli.activations.mode import ActivationMode
from s2a_cli.activations.ops.pointwise import keep_codes
from s2a_cli.activations.ops.registry import HANDLERS
from s2a_cli.config.schema import QuantConfig

EVERYTHING = QuantConfig(bits=4, linear=4, calibrate=False)
WEIGHTS_TRAIN = QuantConfig(bits=4, calibrate=False)
PAPER = QuantConfig(bits=4, attention=None)
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def made(*shape: int, positive: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return x.abs() + 0.5 if positive else x


X, IMAGE, HEADS, VECTOR = made(3, 5, 8), made(2, 6, 7, 9), made(2, 3, 5, 8), made(8)
CHANNELS = made(6)
STATISTICS = {"running_mean": CHANNELS, "running_var": made(6, positive=True)}
KERNEL = {1: made(4, 6, 3), 2: made(4, 6, 3, 3), 3: made(4, 6, 2, 2, 2)}
TRANSPOSED = {1: made(6, 4, 3), 2: made(6, 4, 3, 3), 3: made(6, 4, 2, 2, 2)}
SAMPLES = {1: made(2, 6, 9), 2: IMAGE, 3: made(2, 6, 4, 5, 6)}

# function -> its arguments by name, in order; those behind the first `required` have defaults
POINTWISE = {
    F.gelu: {"approximate": "tanh"},
    F.silu: {"inplace": False},
    F.mish: {"inplace": False},
    F.hardswish: {"inplace": False},
    F.elu: {"alpha": 0.7, "inplace": False},
    F.celu: {"alpha": 0.7, "inplace": False},
    F.selu: {"inplace": False},
    F.softplus: {"beta": 2.0, "threshold": 10.0},
    F.logsigmoid: {},
    torch.sigmoid: {},
    torch.tanh: {},
    F.relu: {"inplace": False},
    torch.relu: {},
    F.relu6: {"inplace": False},
    F.hardtanh: {"min_val": -0.5, "max_val": 0.7, "inplace": False},
    F.hardsigmoid: {"inplace": False},
    F.leaky_relu: {"negative_slope": 0.2, "inplace": False},
}
POINTWISE |= {  # functions that a file of their own registers
    f: {}
    for f, handler in HANDLERS.items()
    if handler.run.__module__ == keep_codes.__module__
    and not isinstance(f, types.MethodDescriptorType)
    and f not in POINTWISE
    and not f.__name__.endswith("_")
}
CALLS = [
    *((function, {"input": X} | arguments, 1) for function, arguments in POINTWISE.items()),
    *((f, {"self": X}, 1) for f in (Tensor.sigmoid, Tensor.tanh, Tensor.relu)),
    *(
        (f, {"self": X}, 1)
        for f in (torch.sigmoid_, Tensor.sigmoid_, torch.tanh_, Tensor.tanh_, torch.relu_, Tensor.relu_)
    ),
    (F.hardtanh_, {"input": X, "min_val": -0.5, "max_val": 0.7}, 1),
    (F.leaky_relu_, {"input": X, "negative_slope": 0.2}, 1),
    (F.layer_norm, {"input": X, "normalized_shape": (8,), "weight": VECTOR, "bias": VECTOR, "eps": 1e-3}, 2),
    (F.rms_norm, {"input": X * 0.05, "normalized_shape": (8,), "weight": VECTOR, "eps": 1e-3}, 2),
    (F.group_norm, {"input": IMAGE, "num_groups": 3, "weight": CHANNELS, "bias": CHANNELS, "eps": 1e-3}, 2),
    (
        F.batch_norm,
        {
            "input": IMAGE,
            **STATISTICS,
            "weight": None,
            "bias": CHANNELS,
            "training": False,
            "momentum": 0.2,
            "eps": 1e-3,
        },
        3,
    ),
    (F.normalize, {"input": X, "p": 2.0, "dim": 2, "eps": 1e-5}, 1),
    (torch.norm, {"input": X, "p": 2, "dim": (0, 1), "keepdim": True}, 1),
    (Tensor.norm, {"self": X, "p": 2, "dim": (0, 1), "keepdim": True}, 1),
    (torch.linalg.vector_norm, {"x": X, "ord": 2, "dim": 1, "keepdim": True}, 1),
    (F.softmax, {"input": X, "dim": 1, "_stacklevel": 3, "dtype": None}, 2),
    (torch.softmax, {"input": X, "dim": 1}, 2),
    (Tensor.softmax, {"self": X, "dim": -1}, 2),
    *((f, {"input": X, "other": made(3, 8, 4)}, 2) for f in (torch.matmul,)),
    *((f, {"self": X, "other": made(3, 8, 4)}, 2) for f in (Tensor.matmul, Tensor.__matmul__)),
    (torch.bmm, {"input": X, "mat2": made(3, 8, 4)}, 2),
    (Tensor.bmm, {"self": X, "mat2": made(3, 8, 4)}, 2),
    *((f, {"input": X, "other": made(3, 5, 1)}, 2) for f in (torch.mul, torch.div, torch.true_divide)),
    *(
        (f, {"self": X, "other": made(3, 5, 1)}, 2)
        for f in (Tensor.mul, Tensor.__mul__, Tensor.div, Tensor.true_divide)
    ),
    *(
        (f, {"self": X, "other": made(3, 5, 1)}, 2)
        for f in (Tensor.__truediv__, Tensor.div_, Tensor.true_divide_, Tensor.__itruediv__)
    ),
    *((f, {"input": X, "exponent": 2}, 2) for f in (torch.pow,)),
    *((f, {"self": X, "exponent": 3}, 2) for f in (Tensor.pow, Tensor.__pow__)),
    (torch.square, {"input": X}, 1),
    (Tensor.square, {"self": X}, 1),
    *((f, {"input": X, "dim": (0, 2), "keepdim": True}, 1) for f in (torch.amax, torch.amin)),
    *((f, {"self": X, "dim": (0, 2), "keepdim": True}, 1) for f in (Tensor.amax, Tensor.amin)),
    *(
        (f, {"input": IMAGE, "kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": True}, 2)
        for f in (F.max_pool2d, torch.max_pool2d)
    ),
    (
        F.avg_pool2d,
        {"input": IMAGE, "kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False},
        2,
    ),
    (F.adaptive_avg_pool2d, {"input": IMAGE, "output_size": (2, 3)}, 2),
    (F.pad, {"input": IMAGE, "pad": (1, 2, 3, 0), "mode": "reflect", "value": None}, 2),
    (F.linear, {"input": X, "weight": made(4, 8), "bias": made(4)}, 2),
    *(
        (
            f,
            {
                "input": SAMPLES[n],
                "weight": KERNEL[n],
                "bias": made(4),
                "stride": 2,
                "padding": 1,
                "dilation": 1,
                "groups": 1,
            },
            2,
        )
        for n, f in enumerate((F.conv1d, F.conv2d, F.conv3d), 1)
    ),
    *(
        (
            f,
            {
                "input": SAMPLES[n],
                "weight": TRANSPOSED[n],
                "bias": made(4),
                "stride": 2,
                "padding": 1,
                "output_padding": 1,
            },
            2,
        )
        for n, f in enumerate((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1)
    ),
    (F.dropout, {"input": X, "p": 0.3, "training": True, "inplace": False}, 1),
    (
        F.scaled_dot_product_attention,
        {"query": HEADS, "key": HEADS, "value": HEADS, "attn_mask": made(5, 5), "dropout_p": 0.0},
        3,
    ),
]
KEYWORD_ONLY = {
    (F.gelu, "approximate"),
    (torch.linalg.vector_norm, "dtype"),
    (Tensor.softmax, "dtype"),
    (torch.div, "rounding_mode"),
}
POSITIONAL_ONLY = {"self", "x"}


def test_every_function_that_is_handled_is_called_here():
    for quant in (EVERYTHING, PAPER):
        assert ActivationMode(quant).handlers.keys() <= {function for function, _, _ in CALLS}


def prepared(value, dtype):
    """An argument in this type; tensors that need a gradient, and are no leaves, so that they can be changed in
    place.
    """
    return value.to(dtype).requires_grad_() * 1 if isinstance(value, Tensor) else value


def results(function, arguments: dict, dtype, how: str, frozen: bool, quant: QuantConfig | None):
    torch.manual_seed(0)
    given = {name: prepared(value, dtype) for name, value in arguments.items()}
    for name in ("weight", "running_mean", "running_var") if frozen else ("running_mean", "running_var"):
        if isinstance(given.get(name), Tensor):
            given[name] = given[name].detach()
    names = list(given)
    first = 1 if how == "keyword" and names[0] in POSITIONAL_ONLY else 0
    keywords = {n: given[n] for n in names[first:] if how == "keyword" or (function, n) in KEYWORD_ONLY}
    args = [given[n] for n in names if n not in keywords]
    with compress_activations(quant) if quant else torch.enable_grad():
        try:
            return function(*args, **keywords).detach()
        except (TypeError, RuntimeError, NotImplementedError) as error:
            return type(error)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "function, arguments, required",
    CALLS,
    ids=lambda value: getattr(value, "__qualname__", None) or getattr(value, "__name__", ""),
)
def test_a_call_is_stock_however_it_is_made(function, arguments, required, dtype, monkeypatch):
    names = list(arguments)
    for one_pass in (False, True):
        monkeypatch.setattr("s2a_cli.activations.ops.pointwise.in_one_pass", lambda x, now=one_pass: now)
        for count in range(required, len(names) + 1):
            given = {name: arguments[name] for name in names[:count]}
            for how in ("positional", "keyword"):
                for frozen in (False, True):
                    stock = results(function, given, dtype, how, frozen, None)
                    for quant in (EVERYTHING, WEIGHTS_TRAIN):
                        found = results(function, given, dtype, how, frozen, quant)
                        if isinstance(stock, type):
                            assert found is stock, (how, names[:count], found)
                        else:
                            assert (
                                isinstance(found, Tensor) and found.dtype == stock.dtype and torch.equal(found, stock)
                            ), (how, names[:count])


@pytest.mark.parametrize("function", [torch.sigmoid, torch.matmul, torch.pow, torch.amax, F.normalize])
def test_an_argument_that_no_handler_knows_is_stocks(function):
    """out= is refused by autograd, in the same words."""
    arguments = {torch.matmul: {"other": made(3, 8, 4)}, torch.pow: {"exponent": 2}}.get(function, {})
    said = []
    for quant in (None, EVERYTHING):
        with compress_activations(quant) if quant else torch.enable_grad(), pytest.raises(RuntimeError) as caught:
            function(X.clone().requires_grad_() * 1, **arguments, out=torch.empty(0))
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_handlers_take_the_names_of_what_they_stand_for():
    handlers = ActivationMode(EVERYTHING).handlers
    for function, arguments, _ in CALLS:
        if function in handlers and "self" not in arguments:
            assert arguments.keys() <= handlers[function].keywords, function
    assert handlers[F.linear].keywords >= {"input", "weight", "bias"}
