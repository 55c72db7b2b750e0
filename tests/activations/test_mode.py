"""Where the mode intercepts, what it leaves alone, and how it lives with the rest of PyTorch."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from s2a_cli.activations import ActivationMode, compress_activations
from s2a_cli.activations.ops import pointwise
from s2a_cli.config.schema import QuantConfig


def config(bits: int | None, **families: int | bool | str | None) -> QuantConfig:
    return QuantConfig(
        name="test", bits=bits, **dict.fromkeys(("pointwise", "norm", "attention", "softmax"), bits) | families
    )


def kept_bytes(context, run, *own: torch.Tensor) -> int:
    known, kept = {x.untyped_storage().data_ptr() for x in own}, {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), context:
        run()
    return sum(kept.values())


def test_without_bits_there_is_no_mode():
    assert isinstance(compress_activations(config(None, lossless=False)), nullcontext)
    assert isinstance(compress_activations(config(None, linear=8)), ActivationMode)


def test_families_without_bits_are_stock():
    x = torch.randn(4, 64, requires_grad=True)
    with compress_activations(config(None, norm=4)):
        assert type(F.gelu(x).grad_fn).__name__ == "GeluBackward0"
        assert type(F.layer_norm(x, (64,)).grad_fn).__name__ == "NormaliseBackward"
        assert type(F.relu(x).grad_fn).__name__ == "ElementwiseBackward"  # exact, so whenever a mode is on


def test_nothing_is_coded_where_no_gradient_flows():
    x = torch.randn(4, 64)
    with compress_activations(config(4)):
        assert F.gelu(x).grad_fn is None
        with torch.no_grad():
            assert F.gelu(x.requires_grad_()).grad_fn is None


INPLACE = {
    "relu": (F.relu, lambda x: F.relu(x, inplace=True)),
    "relu_": (torch.relu, lambda x: x.relu_()),
    "torch.relu_": (torch.relu, torch.relu_),
    "relu6": (F.relu6, lambda x: F.relu6(x, inplace=True)),
    "hardtanh": (F.hardtanh, lambda x: F.hardtanh(x, inplace=True)),
    "leaky_relu": (F.leaky_relu, lambda x: F.leaky_relu(x, 0.01, True)),
    "hardsigmoid": (F.hardsigmoid, lambda x: F.hardsigmoid(x, inplace=True)),
    "hardswish": (F.hardswish, lambda x: F.hardswish(x, inplace=True)),
    "silu": (F.silu, lambda x: F.silu(x, inplace=True)),
    "elu": (F.elu, lambda x: F.elu(x, 1.0, True)),
    "sigmoid_": (torch.sigmoid, lambda x: x.sigmoid_()),
    "tanh_": (torch.tanh, lambda x: x.tanh_()),
}


@pytest.mark.parametrize("name", INPLACE)
def test_in_place(name):
    plain, inplace = INPLACE[name]
    leaf = torch.randn(5, 9, requires_grad=True)
    (stock,) = torch.autograd.grad(plain(leaf * 2).sum(), leaf)
    with compress_activations(config(8)):
        x = leaf * 2
        out = inplace(x)
    assert out.data_ptr() == x.data_ptr()
    assert torch.equal(out, plain(leaf * 2))
    (grad,) = torch.autograd.grad(x.sum(), leaf)  # through the changed input itself
    assert torch.allclose(grad, stock, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.123, 0.5, 0.9])
def test_dropout_is_stock_from_the_same_seed(p, dtype):
    x = torch.randn(3, 5, 7).to(dtype).transpose(0, 2).requires_grad_()
    found = []
    for context in (nullcontext(), compress_activations(config(4))):
        torch.manual_seed(0)
        with context:
            out = F.dropout(x, p)
        after = torch.rand(1)
        found.append((out.detach(), *torch.autograd.grad(out, x, torch.ones_like(out)), after))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert kept_bytes(compress_activations(config(4)), lambda: F.dropout(x, p), x) == 14  # 105 bits


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("name", ["test_nfnet", "test_efficientnet", "test_vit"])
def test_models_that_change_activations_in_place(name, one_pass, monkeypatch):
    """NFNets call gelu(x).mul_(gamma); on CUDA the output is made in one pass with its codes."""
    monkeypatch.setattr(pointwise, "in_one_pass", lambda x: one_pass)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    images = torch.randn(2, 3, 160, 160)
    trained = [p for n, p in model.named_parameters() if n.endswith("bias")]
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(model(images).square().sum(), trained)])
    with compress_activations(config(8)):
        out = model(images)
    found = torch.cat([g.flatten() for g in torch.autograd.grad(out.square().sum(), trained)])
    assert F.cosine_similarity(found, exact, 0) > 0.999


def test_a_class_token_does_not_pin_its_sequence():
    weight = torch.randn(2, 8, requires_grad=True)
    tokens = torch.randn(3, 50, 8, requires_grad=True) * 1
    assert kept_bytes(nullcontext(), lambda: F.linear(tokens[:, 0], weight), weight) == 3 * 50 * 8 * 4
    assert kept_bytes(compress_activations(config(4)), lambda: F.linear(tokens[:, 0], weight), weight) == 3 * 8 * 4


def test_q_k_v_do_not_pin_the_tensor_they_are_views_of():
    qkv = torch.randn(2, 10, 3, 2, 16, requires_grad=True) * 1

    def run() -> None:
        F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))

    assert kept_bytes(compress_activations(config(4)), run) == 3 * (2 * 2 * 10) * (16 // 2 + 2)


def test_a_second_derivative_is_refused():
    x = torch.randn(4, requires_grad=True)
    with compress_activations(config(4)):
        y = F.gelu(x)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_backward_may_run_inside_the_mode():
    q = torch.randn(2, 2, 5, 8, requires_grad=True)
    with compress_activations(config(8)):
        (inside,) = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).sum(), q)
        out = F.scaled_dot_product_attention(q, q, q)
    (outside,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(inside, outside)


def test_autocast():
    block = timm.models.vision_transformer.Block(64, 2, qkv_bias=True)
    x = torch.randn(2, 10, 64, requires_grad=True)
    found = []
    for context in (nullcontext(), compress_activations(config(8))):
        with torch.autocast("cpu", torch.bfloat16), context:
            out = block(x)
        found.append((out.detach(), torch.autograd.grad(out.float().square().sum(), [x, *block.parameters()])))
    assert torch.equal(found[0][0], found[1][0])
    for stock, grad in zip(found[0][1], found[1][1]):
        assert grad.dtype == stock.dtype
        assert (grad - stock).norm() < 0.04 * stock.norm() + 1e-3


def test_a_trace_sees_codes_of_the_real_size():
    def trace(make) -> int:
        block = timm.models.vision_transformer.Block(64, 2, qkv_bias=True).requires_grad_(False)
        return kept_bytes_by_shape(block, make(2, 10, 64))

    def kept_bytes_by_shape(block, x) -> int:
        sizes: list[int] = []

        def pack(t: torch.Tensor) -> torch.Tensor:
            if t.dtype in (torch.uint8, torch.bfloat16):
                sizes.append(t.numel() * t.element_size())
            return t

        x.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), compress_activations(config(4)):
            out = block(x)
        out.sum().backward()
        return sum(sizes)

    real = trace(torch.randn)
    with FakeTensorMode():
        fake = trace(torch.randn)
    assert fake == real > 0
    assert trace(torch.randn) == real  # no fake table is left behind


MODELS = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "deit3_small_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 96, "num_heads": 3, "init_values": 0.1},
    "vit_small_patch14_dinov2": {"img_size": 28, "depth": 2, "embed_dim": 96, "num_heads": 3, "init_values": 0.1},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (1, 2), "num_heads": (2, 4), "embed_dim": 32},
    "convnext_atto": {"depths": (1, 1, 1, 1), "ls_init_value": 0.1},
    "resnet18": {},
    "mobilenetv2_035": {},
    "mobilenetv3_small_050": {},
    "efficientnet_b0": {},
}
# Fraction of stock's kept bytes at 8, 4, 2 bits, bias tuning.
AT_MOST = (0.33, 0.18, 0.10)


@pytest.mark.parametrize("name", MODELS)
def test_backbones(name):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=5, **MODELS[name])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in parameter_name or "head" in parameter_name)
    own = [*model.parameters(), *model.buffers()]
    side = MODELS[name].get("img_size", 64)
    images, labels = torch.randn(2, 3, side, side), torch.tensor([1, 3])

    def step(context) -> tuple[torch.Tensor, torch.Tensor, int]:
        outs: list[torch.Tensor] = []
        torch.manual_seed(1)  # of stochastic depth
        kept = kept_bytes(context, lambda: outs.append(model(images)), *own)
        model.zero_grad()
        F.cross_entropy(outs[0], labels).backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return outs[0].detach(), torch.cat(grads).double(), kept

    out, stock, stock_kept = step(nullcontext())
    for bits, at_most, cosine in zip((8, 4, 2), AT_MOST, (0.999, 0.99, 0.9)):
        coded_out, grad, kept = step(compress_activations(config(bits)))
        assert torch.equal(out, coded_out)
        assert F.cosine_similarity(grad, stock, 0) > cosine
        assert kept < at_most * stock_kept


REAL = os.environ.get("S2A_REAL_DATA")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="S2A_REAL_DATA is not set")
def test_bias_gradients_on_real_weights_and_photos():
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    weights = Path(REAL, "weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors")
    model = timm.create_model(
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        pretrained=True,
        img_size=112,
        pretrained_cfg_overlay={"file": str(weights), "custom_load": False},
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("blocks" in name and "bias" in name)
    photos = sorted(Path(REAL, "flowers5/train").rglob("*.jpg"))[::5]
    images = [pil_to_tensor(Image.open(photo).convert("RGB").resize((112, 112))) for photo in photos]
    batch = torch.stack(images) / 127.5 - 1
    labels = torch.full((len(batch),), 985)  # daisy, so that most photos ask for a change

    def gradients(context) -> list[torch.Tensor]:
        model.zero_grad()
        with context:
            loss = F.cross_entropy(model(batch), labels)
        loss.backward()
        return [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]

    exact = gradients(nullcontext())
    recomputed = {"recompute": "block", "chunks": 4}
    for settings, total, worst in (
        (config(8), 0.9999, 0.999),
        (config(4), 0.99, 0.96),
        (config(None, pointwise=5, norm=5, attention=6, group=32), 0.999, 0.99),
        (config(None, pointwise=4), 0.998, 0.99),
        (config(None, norm=4), 0.999, 0.99),
        (config(None, attention=4), 0.995, 0.97),
        (config(None, softmax=4), 0.997, 0.98),
        (config(None, input=8, **recomputed), 0.9998, 0.998),
        (config(None, input=8, calibrate=False, **recomputed), 0.999, 0.98),
    ):
        found = gradients(compress_activations(settings, model.blocks))
        assert F.cosine_similarity(torch.cat(found), torch.cat(exact), 0) > total
        assert min(F.cosine_similarity(a, b, 0) for a, b in zip(found, exact)) > worst


@pytest.mark.parametrize("function", [F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.silu, F.hardswish])
def test_output_and_codes_in_one_pass_are_those_of_two(monkeypatch, function):
    torch.manual_seed(0)
    x, found = torch.randn(6, 5, 8).transpose(0, 1), []
    for in_one in (False, True):
        monkeypatch.setattr(pointwise, "in_one_pass", lambda x, in_one=in_one: in_one)
        leaf = x.detach().requires_grad_()
        with compress_activations(config(4)):
            out = function(leaf)
        out.backward(torch.ones_like(out))
        found.append((out.detach(), leaf.grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(found[1][0], function(x))
