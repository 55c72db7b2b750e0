"""Blocks that are not alike in every call: experts, flags, paths that are left out; hooks of gradients; weights that
are exchanged.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from s2a_cli.activations import compress_activations
from s2a_cli.common.errors import UserError
from s2a_cli.config.schema import QuantConfig

EXACT = QuantConfig(lossless=False, recompute="block", chunks=1)
CHUNKS = QuantConfig(lossless=False, recompute="block", chunks=2)
INT8 = QuantConfig(bits=8, attention=8, calibrate=False)


class Experts(nn.Module):
    """Each batch goes through one of two experts, as its mean or a flag says."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))

    def forward(self, x: Tensor, expert: int | None = None) -> Tensor:
        chosen = int(x.detach()[0].mean() > 0) if expert is None else expert
        return x + self.experts[chosen](x)


def gradients(block: nn.Module, run, memory) -> dict[str, Tensor | None]:
    block.zero_grad()
    with memory:
        loss = run()
    loss.square().sum().backward()
    return {name: p.grad if p.grad is None else p.grad.clone() for name, p in block.named_parameters()}


def agree(block: nn.Module, run, quant=EXACT):
    """Compares what a block's parameters get in one memory, call by call, with stock PyTorch."""
    memory = compress_activations(quant, [block])
    for call in run:
        torch.manual_seed(1)
        expected = gradients(block, call, torch.enable_grad())
        torch.manual_seed(1)
        found = gradients(block, call, memory)
        for name, gradient in expected.items():
            assert (found[name] is None) == (gradient is None), name
            if gradient is not None:
                torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("quant", [EXACT, CHUNKS])
def test_each_expert_gets_its_gradient(quant):
    torch.manual_seed(0)
    block, x = Experts(), torch.randn(4, 6, 8).abs()
    inputs = [x, -x, x]
    for state in inputs:
        state.requires_grad_()
    agree(block, [lambda x=x: block(x) for x in inputs], quant)
    agree(block, [lambda n=n: block(inputs[0], n) for n in (0, 1, 0)], quant)
    agree(block, [lambda n=n: block(inputs[0], expert=n) for n in (1, 0)], quant)


def test_what_is_left_out_at_first_trains_later():
    class Skipped(Experts):
        skip = True

        def forward(self, x):
            return x * 1 if self.skip else super().forward(x, 0)

    block, x = Skipped(), torch.randn(4, 6, 8)
    memory = compress_activations(EXACT, [block])
    for skip in (True, False):
        block.skip = skip
        with memory:
            y = block(x)
        assert torch.equal(y, block(x))
    y.sum().backward()
    assert block.experts[0][0].weight.grad.any() and block.experts[1][0].weight.grad is None


def test_calls_of_more_kinds_than_are_remembered():
    block, x = Experts(), torch.randn(2, 3, 8, requires_grad=True)
    agree(block, [lambda n=n: block(x, n % 2 + 0 * n) for n in range(3)])

    class Counting(Experts):
        def forward(self, x, step):
            return super().forward(x, step % 2)

    block = Counting()
    agree(block, [lambda n=n: block(x, n) for n in range(150)])


@pytest.mark.parametrize("quant", [EXACT, CHUNKS])
def test_hooks_of_gradients_run_once_on_the_sum(quant):
    torch.manual_seed(0)
    block, x = Experts(), torch.randn(4, 6, 8)
    seen = []
    weight = block.experts[0][0].weight
    weight.register_hook(lambda gradient: (seen.append(gradient.clone()), 2 * gradient)[1])
    agree(block, [lambda: block(x, 0)], quant)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1])


def test_weights_that_are_exchanged_or_changed_before_the_backward_pass_are_refused():
    model, x = nn.Sequential(Experts(), nn.Linear(8, 2)), torch.randn(4, 6, 8)
    memory = compress_activations(EXACT, [model[0]])
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with memory:
        loss = functional_call(model, others, (x,)).sum()
    with pytest.raises(RuntimeError, match="block 0: its parameters were changed or replaced"):
        loss.backward()
    with memory:
        loss = model(x).sum()
    with torch.no_grad():
        model[0].experts[0][2].weight.add_(1)
        model[0].experts[1][2].weight.add_(1)
    with pytest.raises(RuntimeError, match="block 0: its parameters were changed or replaced"):
        loss.backward()
    with memory:
        model(x).sum().backward()


def test_a_position_for_each_of_as_many_positions_as_samples_is_no_hidden_state():
    class Positioned(Experts):
        def forward(self, x, positions):
            return super().forward(x + positions, 0)

    torch.manual_seed(0)
    block, x = Positioned(), torch.randn(6, 6, 8)
    positions = torch.randn(6, 8, requires_grad=True)
    expected = torch.autograd.grad(block(x, positions).square().sum(), positions)[0]
    for quant in (CHUNKS, QuantConfig(bits=4, chunks=2)):
        with compress_activations(quant, [block]):
            y = block(x, positions)
        assert torch.equal(y, block(x, positions))
        found = torch.autograd.grad(y.square().sum(), positions)[0]
        torch.testing.assert_close(found, expected, rtol=0.2, atol=0.2 * expected.abs().max().item())


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min, -100.0])
def test_a_learned_bias_of_attention_is_not_lost_beside_a_mask(masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v, bias = (torch.randn(2, 4, 16, n, generator=generator).requires_grad_() for n in (8, 8, 8, 16))
    causal = torch.ones(16, 16, dtype=torch.bool).triu(1)
    found = []
    for memory in (torch.enable_grad(), compress_activations(INT8, [])):
        with memory:
            y = F.scaled_dot_product_attention(q, k, v, bias.masked_fill(causal, masked))
        found.append(torch.autograd.grad((y * v.detach()).sum(), (q, k, v, bias)))
    for exact, coded in zip(*found):
        assert F.cosine_similarity(exact.flatten(), coded.flatten(), 0) > 0.999


def test_a_query_without_any_key_gives_zeros_as_in_stock():
    q, k, v = (torch.randn(2, 4, 16, 8).requires_grad_() for _ in range(3))
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    mask[1, :, 10:] = False
    with compress_activations("paper", []):
        y = F.scaled_dot_product_attention(q, k, v, mask)
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(y, expected)
    assert not y[1, :, 10:].any()
    for coded, exact in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (y, expected))):
        assert coded.isfinite().all() and F.cosine_similarity(exact.flatten(), coded.flatten(), 0) > 0.95


def test_a_block_that_counts_its_passes_is_refused():
    block = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.GELU(), nn.Linear(8, 8))
    refused = pytest.raises(UserError, match="changes its buffer .* set recompute='none' and chunks=1")
    with refused, compress_activations(EXACT, [block]):
        block(torch.randn(4, 6, 8, requires_grad=True))
    block.eval()  # its estimate stays as it is
    agree(block, [lambda: block(torch.ones(4, 6, 8))])


def test_a_block_whose_results_do_not_begin_with_the_batch_is_told_from_others():
    block, x = nn.LSTM(8, 8, batch_first=True), torch.randn(4, 3, 8, requires_grad=True)
    refused = pytest.raises(
        UserError, match="block 0 .LSTM. returns tensors that do not begin with the batch.*chunks=1"
    )
    with refused, compress_activations(CHUNKS, [block]):
        block(x)
    with compress_activations(EXACT, [block]):
        (y, _), (expected, _) = block(x), block(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.any()
