"""Frozen weights as codes: small errors, outputs and gradients of the dequantized weights, the promised bytes."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from s2a_cli import backbones
from s2a_cli.activations import REFERENCE, compress_activations
from s2a_cli.backbones import frozen_weights, weight_quant
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.config.schema import BackboneConfig, QuantConfig
from s2a_cli.data import build_transform
from s2a_cli.memory import predict, saved_bytes, track
from s2a_cli.methods import STRUCTURES, Attachment
from s2a_cli.methods.parts.deep_supervision import losses_of
from s2a_cli.training import checkpoints
from s2a_cli.training.forecast import predict_step
from s2a_cli.training.step import Step, make_optimizer, train_mode, weight_dtype

KINDS = ("bf16", "int8", "nf4")
SMALL = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)
BACKBONES = {  # timm's name, its arguments, the image size
    "vit": ("vit_tiny_patch16_224", SMALL, None),
    "beit": ("beit_base_patch16_224", SMALL, None),
    "eva": ("eva02_tiny_patch14_224", SMALL, None),
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(img_size=32, window_size=4, embed_dim=32, depths=[1, 1], num_heads=[2, 2], drop_path_rate=0.0),
        None,
    ),
    "convnext": ("convnext_atto", dict(depths=[1, 1, 1, 1], dims=[8, 16, 16, 16]), 64),
    "resnet": ("resnet18", {}, 64),
    "mobilenet": ("mobilenetv3_small_100", {}, 64),
    "efficientnet": ("efficientnet_b0", {}, 64),
    "maxvit": ("maxvit_rmlp_pico_rw_256", dict(img_size=64, depths=(1,) * 4, embed_dim=(32,) * 4), None),
    "xcit": ("xcit_nano_12_p16_224", dict(img_size=32, depth=2, embed_dim=32), None),  # reads a weight's dtype
}
QUANTS = [REFERENCE, QuantConfig(name="recomputed", recompute="block")]


def made(
    name: str = "vit", method: str = "bias", dtype: torch.dtype = torch.float64, *words: str
) -> backbones.Backbone:
    timm, kwargs, size = BACKBONES[name]
    torch.manual_seed(0)
    config = BackboneConfig(name=name, timm=timm, pretrained=False, image_size=size, kwargs=kwargs)
    backbone = backbones.build(config, 4)
    STRUCTURES[method](compose([f"method={method}", *words]).method).attach(backbone)
    train_mode(backbone.model.to(dtype))
    return backbone


def images_for(backbone: backbones.Backbone, count: int = 4) -> torch.Tensor:
    size, dtype = backbone.image.size, next(backbone.head.parameters()).dtype
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), device="cpu")
    return images.to(next(backbone.head.parameters()).device, dtype)


def loss_of(backbone: backbones.Backbone, quant: QuantConfig = REFERENCE) -> torch.Tensor:
    torch.manual_seed(2)
    with compress_activations(quant, backbone.block_modules):
        return losses_of(backbone.model(images_for(backbone)), torch.arange(4)).sum()


def gradients(backbone: backbones.Backbone, quant: QuantConfig = REFERENCE) -> dict[str, torch.Tensor]:
    loss = loss_of(backbone, quant)
    backbone.model.zero_grad()
    loss.backward()
    trained = ((name, p) for name, p in backbone.model.named_parameters() if p.grad is not None)
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in trained}


def stored_layers(backbone: backbones.Backbone) -> dict[str, weight_quant.Quantized]:
    return {name: m for name, m in backbone.model.named_modules() if isinstance(m, weight_quant.Quantized)}


def pair(name: str, kind: str, dtype: torch.dtype = torch.float64) -> tuple[backbones.Backbone, backbones.Backbone]:
    """Returns a backbone with stored weights, and the same one with the dequantized weights as parameters."""
    backbone, twin = made(name, "bias", dtype), made(name, "bias", dtype)
    frozen_weights.store(backbone, kind)
    layers, modules = stored_layers(backbone), dict(twin.model.named_modules())
    assert len(layers) > 4
    for where, layer in layers.items():
        modules[where].weight.data.copy_(layer.weight)
    return backbone, twin


def stored(kind: str, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a normal weight, and the same one quantized and dequantized."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    quantize, dequantize = weight_quant.CODECS[kind]
    codes, *scales = quantize(weight.flatten(1))
    rows = dequantize(codes, scales[0] if scales else None, weight[0].numel(), torch.float32)
    return weight, rows.view(shape)


def test_normal_float_levels_are_those_of_the_paper():
    """Compares with QLoRA, appendix E."""
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert weight_quant.normal_float_entries().tolist() == pytest.approx(published, abs=1e-6)


@pytest.mark.parametrize("shape", [(3072, 768), (400, 80), (320, 3, 3, 3), (960, 1, 7, 7)])
@pytest.mark.parametrize("kind, most", [("bf16", 0.002), ("int8", 0.006), ("nf4", 0.093)])
def test_root_mean_square_error_of_normal_weights(kind, most, shape):
    """Expects sqrt(6.8 / 12) / 127 = 0.0059 of int8: a step is largest / 127, and E(largest^2) of 64 values is 6.8."""
    exact, decoded = stored(kind, *shape)
    error = (decoded - exact).norm() / exact.norm()
    assert 0.8 * most < error < most


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_off_by_half_a_step_at_most(dtype):
    weight = 1e-3 * torch.randn(50, 192, generator=torch.Generator().manual_seed(0))
    weight[:, 64:128] = 0
    codes, scales = weight_quant.quantize_int8(weight)
    decoded = weight_quant.dequantize_int8(codes, scales, 192, dtype)
    assert decoded.dtype == dtype and not decoded[:, 64:128].any()
    largest = weight.unflatten(1, (3, 64)).abs().amax(-1, keepdim=True)
    rounded = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0)
    # half a step, twice that where the scale was rounded down and the largest element with it
    bound = largest * (0.5 / 127 + 2.0**-8 + rounded)
    assert ((decoded.float() - weight).unflatten(1, (3, 64)).abs() <= bound).all()
    inner = weight.unflatten(1, (3, 64)).abs() < 0.99 * largest
    steps = scales.view(torch.bfloat16).float()[..., None]
    assert ((decoded.float() - weight).unflatten(1, (3, 64)).abs() <= 0.501 * steps + rounded * largest)[inner].all()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_rows_of_zeros_stay_zeros(kind):
    quantize, dequantize = weight_quant.CODECS[kind]
    assert not dequantize(*quantize(torch.zeros(8, 128)), 128, torch.float32).any()


@pytest.mark.parametrize("width, group", [(768, 64), (80, 40), (27, 27), (49, 49), (147, 49), (2730, 42)])
def test_groups_are_whole(width, group):
    assert weight_quant.group_size(width) == group


@pytest.mark.parametrize("quant", QUANTS, ids=lambda quant: quant.name)
@pytest.mark.parametrize("name", BACKBONES)
def test_outputs_and_gradients_are_those_of_the_decoded_weights(name, quant):
    backbone, twin = pair(name, "int8")
    expected, got = gradients(twin), gradients(backbone, quant)
    assert got.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_forward_is_stock_to_the_bit(name, kind, dtype):
    backbone, twin = pair(name, kind, dtype)
    with torch.no_grad():
        assert torch.equal(backbone.model(images_for(backbone)), twin.model(images_for(twin)))
    expected, got = gradients(twin), gradients(backbone)
    for key in expected:
        atol = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got[key], expected[key], rtol=1e-2, atol=atol, msg=key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, dtype):
    """Allows for weights dequantized to the dtype of autocast, not to fp32 and then rounded by autocast."""
    backbone, twin = pair("vit", kind, torch.float32)
    with torch.autocast("cpu", dtype):
        expected, got = gradients(twin), gradients(backbone)
    for key in expected:
        assert got[key].dtype == torch.float32
        assert (got[key] - expected[key]).norm() <= 0.02 * expected[key].norm() + 1e-4, key


def test_second_derivatives_are_refused():
    backbone = made()
    frozen_weights.store(backbone, "int8")
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss_of(backbone), [backbone.model.blocks[0].norm1.bias], create_graph=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_compiled(kind):
    backbone = made(dtype=torch.float32)
    frozen_weights.store(backbone, kind)
    expected = gradients(backbone)
    backbone.model.compile(backend="eager")
    torch.testing.assert_close(gradients(backbone), expected)


def test_weights_that_a_parent_reads_stay():
    backbone = made("beit")
    frozen_weights.store(backbone, "int8")
    layers = stored_layers(backbone)
    assert "blocks.0.attn.qkv" not in layers
    assert {"patch_embed.proj", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"} <= layers.keys()


@pytest.mark.parametrize(
    "method, words",
    [
        ("linear", []),
        ("bias", []),
        ("bias", ["method.blocks=last:1"]),
        ("s2a", ["method.side.width=4"]),
        ("side", ["method.width=4"]),
    ],
)
def test_only_frozen_weights_of_the_backbone_are_stored(method, words):
    backbone = made("vit", method, torch.float32, *words)
    before, state = backbone.count(), checkpoints.trainable_state(backbone.model)
    frozen_weights.store(backbone, "nf4")
    assert backbone.count() == before
    layers = stored_layers(backbone)
    assert len(layers) == 1 + 2 * 4
    assert not any(name.startswith("s2a.") or name == "head" for name in layers)
    now = checkpoints.trainable_state(backbone.model)
    assert now.keys() == state.keys() and all(torch.equal(now[key], state[key]) for key in state)
    checkpoints.restore(backbone.model, {key: tensor + 1 for key, tensor in state.items()})
    now = checkpoints.trainable_state(backbone.model)
    assert all(torch.equal(now[key], state[key] + 1) for key in state)


def test_full_fine_tuning_has_nothing_to_store():
    with pytest.raises(UserError, match="backbone.weights=int8: this method freezes no weight"):
        frozen_weights.store(made("vit", "full"), "int8")


def test_a_weight_that_trains_stays():
    backbone = made()
    backbone.model.blocks[0].mlp.fc1.weight.requires_grad_(True)
    frozen_weights.store(backbone, "int8")
    assert "blocks.0.mlp.fc1" not in stored_layers(backbone) and "blocks.0.mlp.fc2" in stored_layers(backbone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_decoded_is_kept(kind, autocast):
    backbone = made("vit", "bias", torch.float32)

    def kept() -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return saved_bytes(lambda: loss_of(backbone), backbone.model)

    before = kept()
    weights = sum(m.weight.numel() for m in backbone.model.modules() if type(m) in (nn.Linear, nn.Conv2d))
    frozen_weights.store(backbone, kind)
    assert kept() <= before
    if autocast:  # PyTorch keeps a bfloat16 copy of each frozen weight whose gradient of the input is wanted
        assert before - kept() > weights


@pytest.mark.parametrize("kind", KINDS)
def test_codes_survive_changes_of_dtype_and_copies(kind):
    backbone = made("vit", "bias", torch.float32)
    frozen_weights.store(backbone, kind)
    layer = stored_layers(backbone)["blocks.0.mlp.fc1"]
    before = layer.weight
    backbone.model.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    backbone.model.to(torch.float32)
    assert torch.equal(layer.weight, before)
    other = copy.deepcopy(backbone.model).blocks[0].mlp.fc1
    assert torch.equal(other.weight, before) and other.codes is not layer.codes
    layer.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("quant", ["none", "exact"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_predicted_memory_is_that_of_real_tensors(kind, quant):
    config = compose(["method=bias", f"quant={quant}", "optim.batch_size=4"])
    backbone = made("vit", "bias", torch.float32)
    frozen_weights.store(backbone, kind)
    batch = images_for(backbone), torch.arange(4)

    def arguments() -> tuple:
        step = Step(config, torch.device("cpu"), Attachment(backbone))
        return backbone.model, batch, step, lambda model: make_optimizer(config.optim, model)

    predicted, real = predict(*arguments()), track(*arguments())
    assert predicted.static_mib == real.static_mib
    assert predicted.kept_mib == real.kept_mib
    assert predicted.peak_mib == pytest.approx(real.peak_mib, rel=0.1)  # real ones also show what custom operators take


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp-bf16"])
def test_memory_of_vit_b(precision):
    config = compose(["backbone=vit_b", "method=bias", "quant=none", "optim.batch_size=64", f"precision={precision}"])
    found = {}
    for kind in ("fp32", *KINDS):
        backbone = backbones.build(config.backbone, 10, meta=True)
        attached = STRUCTURES["bias"](config.method).attach(backbone)
        frozen_weights.store(backbone, kind)
        backbone.model.to(weight_dtype(precision))
        found[kind] = predict_step(attached, config, 64)
    whole = found["fp32"]
    assert whole.static_mib == pytest.approx(165 if precision == "bf16" else 328, abs=3)
    for kind, static in (("bf16", 166), ("int8", 87), ("nf4", 47)):
        assert found[kind].static_mib == pytest.approx(static, abs=3)
        kept = whole.kept_mib - found[kind].kept_mib  # no longer: under autocast the images and the weights in bfloat16
        assert kept == pytest.approx({"fp32": 0, "bf16": 0, "amp-bf16": 18.4 + 163.1}[precision], abs=0.2)
        saved = whole.static_mib - found[kind].static_mib + kept
        assert whole.peak_mib - found[kind].peak_mib == pytest.approx(saved, abs=10)  # one layer is decoded


@pytest.mark.slow
def test_real_weights_still_see_the_same(real_data):
    weights = real_data / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    words = ["backbone=vit_t", "backbone.image_size=112", f"backbone.checkpoint={weights}", "method=linear"]
    config = compose([*words, "dataset=folder", f"dataset.root={real_data / 'flowers5'}"])
    classifier = safetensors.torch.load_file(weights)
    logits = {}
    for kind in ("fp32", *KINDS):
        backbone = backbones.build(config.backbone, 1000)
        backbone.head.layers["head"].load_state_dict({key: classifier[f"head.{key}"] for key in ("weight", "bias")})
        STRUCTURES["linear"](config.method).attach(backbone)
        frozen_weights.store(backbone, kind)
        transform = build_transform(backbone.image, config.dataset, False)
        files = sorted((real_data / "flowers5" / "test").glob("*/*"))
        files = files[:: max(1, len(files) // 40)]
        images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        with torch.no_grad():
            logits[kind] = backbone.model.eval()(images)
    cosine = {kind: F.cosine_similarity(logits[kind], logits["fp32"]).mean().item() for kind in KINDS}
    same = {kind: (logits[kind].argmax(1) == logits["fp32"].argmax(1)).float().mean().item() for kind in KINDS}
    assert cosine["bf16"] > 0.9999 and cosine["int8"] > 0.999 and cosine["nf4"] > 0.85
    assert same["bf16"] == 1 and same["int8"] >= 0.9
