"""Recomputed blocks of any shape: gradients that are nobody else's, outputs that can be changed, several tensors,
random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from s2a_cli.activations import compress_activations
from s2a_cli.config.schema import QuantConfig

EXACT = QuantConfig(lossless=False, recompute="block", chunks=8)
TINY = QuantConfig(recompute="block", input=8, chunks=8)


class Positions(nn.Module):
    """A block that adds its own [1, N, C] parameter: with one sample a piece its gradient is that of the output
    itself.
    """

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 16, 8))
        self.inner = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8))

    def forward(self, x):
        return self.inner(x) + self.positions


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_no_gradient_of_others_is_added_to(batch):
    torch.manual_seed(0)
    block, x = Positions(), torch.randn(batch, 16, 8, requires_grad=True)
    found = []
    for memory in (torch.enable_grad(), compress_activations(EXACT, [block])):
        with memory:
            y = x * 1 + block(x)
        found.append(torch.autograd.grad(y.square().sum() / 2, [x, *block.parameters()]))
    for exact, grad in zip(*found):
        torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize("quant", [EXACT, TINY], ids=["exact", "tiny"])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_an_output_can_be_changed_in_place(quant, batch):
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8), nn.Unflatten(-1, (2, 4)), nn.Flatten(-2)
    )  # ends in a view
    x = torch.randn(batch, 16, 8, requires_grad=True)
    found = []
    for memory in (torch.enable_grad(), compress_activations(quant, [block])):
        with memory:
            y = block(x)
            y.mul_(2).add_(1)
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=0.05)


def test_a_block_that_returns_its_input_does_not_share_it():
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Linear(8, 8)

        def forward(self, x, y):
            return x, self.scale(torch.tanh(x) * y)

    block = Same()
    x, y = torch.randn(4, 3, 8, requires_grad=True), torch.randn(4, 3, 8, requires_grad=True)
    found = []
    for memory in (torch.enable_grad(), compress_activations(EXACT, [block])):
        with memory:
            a, b = block(x, y)
            if memory is not found:
                loss = ((a * 1).add_(1) * b).sum()
        found.append(torch.autograd.grad(loss, [x, y, block.scale.bias]))
        assert memory.__class__.__name__ == "enable_grad" or a.data_ptr() != x.data_ptr()
    for exact, grad in zip(*found):
        torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize(
    "quant",
    [EXACT, QuantConfig(lossless=False, chunks=4), QuantConfig(bits=4, chunks=4)],
    ids=["exact", "pieces", "int4"],
)
def test_a_block_that_changes_its_input_in_place_is_left_whole(quant):
    """As a layer of VGG whose first operator is a ReLU in place."""
    torch.manual_seed(0)
    first, block = nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3))
    images, found = torch.randn(4, 3, 9, 9), []
    for memory in (torch.enable_grad(), compress_activations(quant, [block])):
        with memory:
            out = block(first(images))
        found.append(torch.autograd.grad(out.square().sum(), [*first.parameters(), *block.parameters()]))
    for exact, grad in zip(*found):
        torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-4)


class Several(nn.Module):
    """Takes and returns hidden states in a list, beside numbers: as CrossViT's, NASNet's and MViT's blocks do."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(6, 6)

    def forward(self, states, size, scale=None):
        x, y = states
        x = x + torch.tanh(self.a(x)) * y.mean(-1, keepdim=True)
        return [x, y + self.b(y) * (1 if scale is None else scale)], (size[0] * 2, size[1])


@pytest.mark.parametrize("quant", [EXACT, TINY, QuantConfig(lossless=False, chunks=3)], ids=["exact", "tiny", "pieces"])
@pytest.mark.parametrize("scale", [None, "frozen", "trained"])
def test_several_hidden_states(quant, scale):
    torch.manual_seed(0)
    block, sizes = Several(), []
    block.b.requires_grad_(False)
    table = (
        None if scale is None else torch.randn(4, 6, requires_grad=scale == "trained")
    )  # of each position, not of each sample
    start = torch.randn(5, 4, 8, requires_grad=True), torch.randn(5, 4, 6, requires_grad=True)
    block.a.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    found = []
    for memory in (torch.enable_grad(), compress_activations(quant, [block])):
        sizes.clear()
        with memory:
            (x, y), size = block(list(start), (3, 4), scale=table)
        assert size == (6, 4)
        wanted = [*start, *block.a.parameters(), *([table] if scale == "trained" else [])]
        found.append(torch.autograd.grad((x.square().sum() + y.square().sum()), wanted))
    assert max(sizes) == (5 if scale == "trained" else 2 if quant.chunks == 3 else 1), "pieces of the batch"
    for exact, grad in zip(*found):
        torch.testing.assert_close(grad, exact, rtol=0.05, atol=0.05 if quant is TINY else 1e-4)


@dataclass
class Opaque:
    """What PyTorch does not look into."""

    hidden: torch.Tensor


class Odd(nn.Module):
    """Takes integers first, and returns something else than tensors, or tensors that are not split by sample."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.table, self.linear = kind, nn.Embedding(7, 8), nn.Linear(8, 8)

    def forward(self, numbers, x):
        y = x + torch.tanh(self.linear(x)) + self.table(numbers)
        return {
            "opaque": Opaque(y),
            "mean": (y, y.mean(0, keepdim=True)),
            "dictionary": {"hidden": y, "size": 3},
            "numbers": (y, y.argmax(-1)),
        }[self.kind]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["opaque", "mean", "dictionary", "numbers"])
@pytest.mark.parametrize("quant", [EXACT, QuantConfig(lossless=False, chunks=3), TINY], ids=["exact", "pieces", "tiny"])
def test_odd_arguments_and_results(quant, kind, grad):
    torch.manual_seed(0)
    block, numbers, x = Odd(kind), torch.arange(5) % 7, torch.randn(5, 8)

    def run(memory):
        start = x.clone().requires_grad_(grad)
        with memory, torch.set_grad_enabled(grad):
            found = block(numbers, start)
        if kind == "opaque":
            found = found.hidden
        elif kind == "dictionary":
            assert found["size"] == 3
            found = found["hidden"]
        else:
            found, other = found
            assert other.shape == ((1, 8) if kind == "mean" else (5,))
        if not grad:
            return [found]
        return [found.detach(), *torch.autograd.grad(found.square().sum(), [start, *block.parameters()])]

    for exact, found in zip(run(torch.enable_grad()), run(compress_activations(quant, [block]))):
        torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05 if quant is TINY else 1e-5)


def test_tensors_of_another_length_keep_the_batch_whole():
    """As in TNT, whose blocks take [B * 196, 16, 24] beside [B, 197, 384]."""
    model = timm.create_model("tnt_s_legacy_patch16_224", depth=2, num_classes=3).eval()
    images = torch.randn(2, 3, 224, 224)
    expected = model(images)
    with compress_activations(EXACT, model.blocks), torch.no_grad():
        torch.testing.assert_close(model(images), expected)
    wanted = [p for p in model.parameters() if p.ndim == 1]
    exact = torch.autograd.grad(expected.square().sum(), wanted)
    with compress_activations(EXACT, model.blocks):
        out = model(images)
    for a, b in zip(torch.autograd.grad(out.square().sum(), wanted), exact):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("quant", [EXACT, TINY, QuantConfig(bits=4, chunks=4)], ids=["exact", "tiny", "int4"])
def test_an_empty_batch(quant):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    with compress_activations(quant, model.blocks), torch.no_grad():
        assert model(torch.randn(0, 3, 32, 32)).shape == (0, 3)
    with compress_activations(quant, model.blocks):
        model(torch.randn(0, 3, 32, 32)).sum().backward()


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.paths = nn.Linear(8, 8), nn.Linear(8, 8), nn.ModuleList(DropPath(0.5) for _ in range(2))

    def forward(self, x):
        x = x + self.paths[0](self.a(x))
        return x + self.paths[1](torch.tanh(self.b(x)))


@pytest.mark.parametrize("quant", [EXACT, QuantConfig(lossless=False, chunks=8)], ids=["recomputed", "pieces"])
def test_stochastic_depth_in_pieces_drops_what_it_drops_without(quant):
    torch.manual_seed(0)
    block, x, found = Dropped().train(), torch.randn(16, 3, 8, requires_grad=True), []
    for memory in (torch.enable_grad(), compress_activations(quant, [block])):
        for _ in range(2):  # the first call looks at a sample
            torch.manual_seed(1)
            with memory:
                y = block(x)
            after = torch.rand(1)
        found.append((y.detach(), after, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])))
    for exact, grad in zip(*found):
        torch.testing.assert_close(grad, exact)


def test_linear_layers_by_keyword():
    """As peft's HRA calls them; the layer whose output nothing reads is found all the same."""

    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bias = (nn.Parameter(torch.randn(*shape)) for shape in ((8, 8), (8, 8), (8,)))
            self.b.requires_grad_(False)

        def forward(self, x):
            hidden = torch.tanh(nn.functional.linear(input=x, weight=self.a) + self.bias)
            return x + nn.functional.linear(hidden, weight=self.b)

    block, x = ByKeyword(), torch.randn(8, 3, 8, requires_grad=True)
    exact = torch.autograd.grad(block(x).square().sum(), [x, block.a, block.bias])
    for _ in range(2):
        with compress_activations(EXACT, [block]):
            out = block(x)
        for a, b in zip(torch.autograd.grad(out.square().sum(), [x, block.a, block.bias]), exact):
            torch.testing.assert_close(a, b)


def test_a_weight_that_trains_is_read_even_in_the_last_layer():
    """A layer that was frozen when the block was looked at, and is not any more."""
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    block[2].requires_grad_(False)
    memory, x = compress_activations(EXACT, [block]), torch.randn(8, 8, requires_grad=True)
    with memory:
        block(x).sum().backward()
    block[2].requires_grad_(True)
    exact = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    with memory:
        out = block(x)
    for a, b in zip(torch.autograd.grad(out.square().sum(), list(block.parameters())), exact):
        torch.testing.assert_close(a, b)
