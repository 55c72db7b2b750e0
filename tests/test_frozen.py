"""Frozen weights as codes: small errors, the gradients of the decoded weights, and the bytes that they promise."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from s2a_cli import backbones, checkpoints, frozen
from s2a_cli.activations import STOCK, remember
from s2a_cli.compose import compose
from s2a_cli.config import BackboneConfig, QuantConfig
from s2a_cli.data import build_transform
from s2a_cli.errors import UserError
from s2a_cli.memory import saved_bytes
from s2a_cli.methods import METHODS
from s2a_cli.steps import train_mode
from s2a_cli.training import predict_step

KINDS = ("bf16", "int8", "nf4")
BACKBONES = {  # timm's name, its arguments, the image size
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}, None),
    "beit": ("beit_base_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}, None),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 2, "num_heads": 2}, None),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2], "drop_path_rate": 0.0},
        None,
    ),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 16]}, 64),
    "resnet": ("resnet18", {}, 64),
    "mobilenet": ("mobilenetv3_small_100", {}, 64),
    "efficientnet": ("efficientnet_b0", {}, 64),
}


def made(name: str, method: str = "bias", dtype: torch.dtype = torch.float64) -> backbones.Backbone:
    timm, kwargs, size = BACKBONES[name]
    torch.manual_seed(0)
    config = BackboneConfig(name=name, timm=timm, pretrained=False, image_size=size, kwargs=kwargs)
    backbone = backbones.build(config, 4)
    small = {"side": ["method.reduction=2"], "s2a": ["method.side.reduction=2"]}.get(method, [])
    METHODS[method](compose([f"method={method}", *small]).method).attach(backbone)
    train_mode(backbone.model.to(dtype))
    return backbone


def gradients(backbone: backbones.Backbone, quant: QuantConfig = STOCK) -> dict[str, torch.Tensor]:
    size, dtype = backbone.image.size, next(backbone.head.parameters()).dtype
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.manual_seed(2)
    with remember(quant, backbone.block_modules):
        loss = F.cross_entropy(backbone.model(images), torch.arange(4))
    backbone.model.zero_grad()
    loss.backward()
    trained = ((name, p) for name, p in backbone.model.named_parameters() if p.grad is not None)
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in trained}


def stored_layers(backbone: backbones.Backbone) -> dict[str, frozen.Stored]:
    return {name: m for name, m in backbone.model.named_modules() if isinstance(m, frozen.Stored)}


def test_normal_float_levels_are_those_of_the_paper():
    """QLoRA, appendix E."""
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert frozen.normal_float_levels().tolist() == pytest.approx(published, abs=1e-6)


@pytest.mark.parametrize("kind, least, most", [("bf16", 1e-3, 3e-3), ("int8", 3e-3, 7e-3), ("nf4", 0.08, 0.1)])
def test_error_of_normal_weights(kind, least, most):
    torch.manual_seed(0)
    layer = nn.Linear(300, 200, bias=False)
    exact = layer.weight.detach().normal_().clone()
    layer.__class__ = frozen.StoredLinear
    layer.store(kind)
    error = (layer.decode(torch.float32, *layer.tensors()) - exact).norm() / exact.norm()
    assert least < error < most


@pytest.mark.parametrize("quant", [STOCK, QuantConfig(name="exact"), QuantConfig(name="block", recompute="block")], ids=lambda q: q.name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_are_those_of_the_decoded_weights(name, kind, quant):
    backbone, twin = made(name), made(name)
    frozen.store(backbone, kind)
    layers = stored_layers(backbone)
    assert layers
    modules = dict(twin.model.named_modules())
    for where, layer in layers.items():
        modules[where].weight.data.copy_(layer.decode(torch.float64, *layer.tensors()))
    expected, got = gradients(twin), gradients(backbone, quant)
    assert got.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-6, atol=1e-9, msg=key)


def test_weights_that_a_parent_reads_stay():
    backbone = made("beit")
    frozen.store(backbone, "int8")
    layers = stored_layers(backbone)
    assert "blocks.0.attn.qkv" not in layers and {"blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"} <= layers.keys()


@pytest.mark.parametrize("method", ["linear", "bias", "s2a", "side"])
def test_only_frozen_weights_of_the_backbone_are_stored(method):
    backbone = made("vit", method)
    before, trainable = backbone.count(), checkpoints.trainable_state(backbone.model)
    frozen.store(backbone, "nf4")
    assert backbone.count() == before
    assert checkpoints.trainable_state(backbone.model).keys() == trainable.keys()
    assert not any(name.startswith("s2a.") or name == "head" for name in stored_layers(backbone))
    checkpoints.restore(backbone.model, trainable)


def test_full_fine_tuning_has_nothing_to_store():
    with pytest.raises(UserError, match="backbone.weights=int8: this method trains every weight"):
        frozen.store(made("vit", "full"), "int8")


def test_nothing_decoded_is_kept_for_backward():
    backbone = made("vit", dtype=torch.float32)
    kept = saved_bytes(lambda: gradients(backbone), backbone.model)
    frozen.store(backbone, "int8")
    for context in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=context):
            now = saved_bytes(lambda: gradients(backbone), backbone.model)
        assert now <= kept


def test_codes_survive_a_change_of_dtype():
    backbone = made("vit", dtype=torch.float32)
    frozen.store(backbone, "nf4")
    layer = next(iter(stored_layers(backbone).values()))
    before = layer.decode(torch.float32, *layer.tensors())
    backbone.model.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(layer.decode(torch.float32, *layer.tensors()), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp-bf16"])
def test_static_memory_falls_as_predicted_for_vit_b(precision):
    config = compose(["backbone=vit_b", "method=bias", "quant=tiny", "optim.batch_size=4", f"precision={precision}"])
    found = {}
    for kind in ("fp32", *KINDS):
        backbone = backbones.build(config.backbone, 10, meta=True)
        METHODS["bias"](config.method).attach(backbone)
        backbone.model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        frozen.store(backbone, kind)
        found[kind] = predict_step(backbone, config, 4)
    assert found["fp32"].static_mib == pytest.approx(164 if precision == "bf16" else 328, abs=3)
    assert found["bf16"].static_mib == pytest.approx(165, abs=3)
    assert found["int8"].static_mib == pytest.approx(86, abs=3)
    assert found["nf4"].static_mib == pytest.approx(46, abs=3)
    for kind in ("int8", "nf4"):
        saved = found["fp32"].static_mib - found[kind].static_mib
        assert found["fp32"].peak_mib - found[kind].peak_mib == pytest.approx(saved, abs=12)  # one layer decoded


def test_real_weights_still_see_the_same(real_data):
    weights = real_data / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    words = ["backbone=vit_t", "backbone.image_size=112", f"backbone.checkpoint={weights}", "method=linear", "dataset=folder"]
    config = compose([*words, f"dataset.root={real_data / 'flowers5'}"])
    files = sorted((real_data / "flowers5" / "test").glob("*/*"))[::4]
    features = {}
    for kind in ("fp32", *KINDS):
        backbone = backbones.build(config.backbone, 5)
        METHODS["linear"](config.method).attach(backbone)
        frozen.store(backbone, kind)
        transform = build_transform(backbone.image, config.dataset, False)
        images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        with torch.no_grad():
            features[kind] = backbone.model.forward_head(backbone.model.forward_features(images), pre_logits=True)
    cosine = {kind: F.cosine_similarity(features[kind], features["fp32"]).mean().item() for kind in KINDS}
    assert cosine["bf16"] > 0.9999 and cosine["int8"] > 0.999 and cosine["nf4"] > 0.85  # 0.88: a ViT-Ti feels 4 bits
