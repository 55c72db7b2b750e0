"""Every operator: forward bits, gradients against float64, and bytes kept, through one tester and one table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from operator_cases import CASES, HEADS, Case, config, unfused
from torch import Tensor

from s2a_cli.activations import compress_activations
from s2a_cli.activations.quant.packing import groupwise_size
from s2a_cli.config.schema import QuantConfig

TOLERANCE = {8: 0.03, 4: 0.2, 2: 0.9}  # relative error of a gradient, in norm


def inputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = 1.0 if "attention" in case.name else 1.5  # of larger q and k, each code moves the softmax more
    made = [torch.randn(shape, generator=generator) * scale for shape in case.shapes]
    return [x.to(dtype).requires_grad_(i not in case.frozen) for i, x in enumerate(made)]


def results(case: Case, bits: int | None, arguments: list[Tensor]) -> tuple[Tensor, list[Tensor], int]:
    """Output, gradients and bytes kept (without the arguments' own storage) at `bits`, None: stock."""
    own = {x.untyped_storage().data_ptr() for x in arguments}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        compress_activations(config(bits, bits if case.linear else None)),
    ):
        out = case.run(*arguments)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grads = torch.autograd.grad(out, [x for x in arguments if x.requires_grad], cotangent)
    return out.detach(), list(grads), sum(kept.values())


@pytest.fixture(params=[False, True], ids=["two passes", "one pass"])
def one_pass(request, monkeypatch):
    """Both ways in which a function and its codes are made, whatever the device."""
    monkeypatch.setattr("s2a_cli.activations.ops.pointwise.in_one_pass", lambda x: request.param)


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_is_stock_and_gradients_are_near(case):
    truth = results(case, None, inputs(case, torch.float64))[1]
    stock_out, stock_grads, _ = results(case, None, inputs(case, torch.float32))
    for bits, tolerance in TOLERANCE.items():
        out, grads, kept = results(case, bits, inputs(case, torch.float32))
        assert torch.equal(out, stock_out)
        for grad, stock, right in zip(grads, stock_grads, truth, strict=True):
            assert grad.shape == stock.shape and grad.dtype == stock.dtype
            if case.exact:
                assert torch.allclose(grad, stock, rtol=1e-5, atol=1e-6)
            else:
                assert (grad - right).norm() <= tolerance * right.norm() + 1e-6
        if case.kept is not None:
            assert kept == case.kept(bits)


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_other_types(case, dtype):
    truth = results(case, None, inputs(case, torch.float64))[1]
    stock_out, stock_grads, _ = results(case, None, inputs(case, dtype))
    out, grads, _ = results(case, 8, inputs(case, dtype))
    assert torch.equal(out, stock_out)
    for grad, stock, right in zip(grads, stock_grads, truth, strict=True):
        assert grad.dtype == stock.dtype
        stock_error = (stock - right).norm()
        assert (grad - right).norm() <= 0.03 * right.norm() + 3 * stock_error + 1e-6


@pytest.mark.parametrize("case", [c for c in CASES if not c.exact], ids=lambda case: case.name)
def test_strided_inputs_give_the_same(case):
    plain = results(case, 4, inputs(case, torch.float32))
    strided = [
        x.detach().repeat_interleave(2, -1)[..., ::2] if x.dim() else x.detach() for x in inputs(case, torch.float32)
    ]
    strided = [x.requires_grad_(i not in case.frozen) for i, x in enumerate(strided)]
    moved = results(case, 4, strided)
    assert torch.allclose(moved[0], plain[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(moved[1], plain[1], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


ROWS_OF_8 = {
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "softmax": lambda x: x.softmax(-1),
    "gelu": F.gelu,
    "relu": F.relu,
}


@pytest.mark.parametrize("run", ROWS_OF_8)
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("shape", [(1, 4, 8), (3, 1, 8), (2, 8, 8), (1, 1, 5)])
def test_views_of_any_order_and_with_gaps(run, order, shape):
    """As q, k and v are that are made in one tensor."""
    x = torch.randn(*shape, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    check_view(ROWS_OF_8[run], x, lambda x: x[..., 8:16].permute(order))


@pytest.mark.parametrize("run", ROWS_OF_8)
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_that_lie_as_columns(run, batch):
    """As tokens do that come from a map of channels."""
    x = torch.randn(batch, 8, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    check_view(ROWS_OF_8[run], x, lambda x: x.transpose(1, 2))


def check_view(run: Callable, x: Tensor, view: Callable) -> None:
    stock = run(view(x))
    cotangent = torch.randn(stock.shape, generator=torch.Generator().manual_seed(1))
    with compress_activations(config(8)):
        out = run(view(x))
    assert torch.equal(out, stock)
    found, exact = (torch.autograd.grad(y, x, cotangent)[0] for y in (out, stock))
    assert (found - exact).norm() <= 0.03 * exact.norm()


@pytest.mark.parametrize("value", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_extreme_values_stay_finite(case, value):
    arguments = [torch.full_like(x, value) if i == 0 else x.detach() for i, x in enumerate(inputs(case, torch.float32))]
    arguments = [x.requires_grad_(i not in case.frozen) for i, x in enumerate(arguments)]
    for bits in (2, 8):
        assert all(grad.isfinite().all() for grad in results(case, bits, arguments)[1])


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_can_be_changed_in_place_as_stock_ones_can(case):
    """A result that is a view of what a custom function made could not be."""
    stock = case.run(*inputs(case, torch.float32))
    with compress_activations(config(4, 4 if case.linear else None)):
        out = case.run(*inputs(case, torch.float32))
    assert not out._is_view() or stock._is_view()
    try:
        stock.mul_(2).sum().backward()
    except RuntimeError:
        return  # stock keeps its result
    out.mul_(2).sum().backward()


@pytest.mark.usefixtures("one_pass")
def test_channels_last_keeps_its_layout():
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(8, 8, 3, 3)
    with compress_activations(config(4)):
        for run in (F.gelu, F.relu, lambda x: F.conv2d(x, weight, padding=1), lambda x: F.max_pool2d(x, 3, 1, 1)):
            out = run(x)
            (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
            assert out.is_contiguous(memory_format=torch.channels_last)
            assert grad.is_contiguous(memory_format=torch.channels_last)


MASKS = {
    "none": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.rand(10, 10, generator=torch.Generator().manual_seed(1)) < 0.9},
    "float": {"attn_mask": torch.randn(2, 1, 10, 10, generator=torch.Generator().manual_seed(1))},
}


@pytest.mark.parametrize("name", MASKS)
def test_unfused_attention_keeps_q_k_v_and_codes_of_the_map(name, set_chunk_sizes):
    """As the paper has it: stock's result to rounding, a sample at a time."""
    set_chunk_sizes(decoded=1)
    q, k, v = (torch.randn(HEADS, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
    cotangent = torch.randn(HEADS, generator=torch.Generator().manual_seed(4))
    stock = F.scaled_dot_product_attention(q, k, v, **MASKS[name])
    exact = torch.autograd.grad(stock, (q, k, v), cotangent)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    for bits, tolerance in TOLERANCE.items():
        kept.clear()
        context = compress_activations(QuantConfig(name="test", softmax=bits))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), context:
            out = F.scaled_dot_product_attention(q, k, v, **MASKS[name])
        assert torch.allclose(out, stock, rtol=1e-5, atol=1e-6)
        assert sum(kept.values()) == 3 * 4 * q.numel() + 2 * groupwise_size(30, 10, 64, bits)
        for grad, right in zip(torch.autograd.grad(out, (q, k, v), cotangent), exact):
            assert (grad - right).norm() < tolerance * right.norm()


def test_unfused_attention_leaves_what_it_does_not_cover():
    q = torch.randn(2, 4, 5, 8, requires_grad=True)
    mask = torch.zeros(5, 5, requires_grad=True)
    with compress_activations(QuantConfig(name="test", softmax=4)):
        for arguments in ({"attn_mask": mask}, {"dropout_p": 0.5}):
            assert "Unfused" not in type(F.scaled_dot_product_attention(q, q, q, **arguments).grad_fn).__name__


def test_codes_of_a_map_are_shared_under_hooks_of_others():
    q = torch.randn(HEADS, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x), compress_activations(config(4)):
        out = unfused(q, q, q)
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()
