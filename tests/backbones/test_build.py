"""Backbones: what is found in them, their weights, and what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from s2a_cli import backbones
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose, groups
from s2a_cli.config.schema import BackboneConfig
from s2a_cli.training import run

NAMES = sorted(set(groups()["backbone"]) - {"timm", "vit_micro"})
BLOCKS = {  # blocks, layout at the last one
    "vit_t": (12, "tokens"), "vit_s": (12, "tokens"), "vit_b": (12, "tokens"), "vit_l": (24, "tokens"),
    "deit_s": (12, "tokens"), "dinov2_s": (12, "tokens"), "dinov2_l": (24, "tokens"), "dinov2_g": (40, "tokens"),
    "swin_t": (12, "channels_last"), "swin_b": (24, "channels_last"),
    "convnext_t": (18, "channels_first"), "convnext_b": (36, "channels_first"),
    "resnet18": (8, "channels_first"), "resnet50": (16, "channels_first"),
    "mobilenetv2": (17, "channels_first"), "mobilenetv3": (16, "channels_first"),
    "efficientnet_b0": (16, "channels_first"),
}  # fmt: skip
TINY = dict(img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3)


def tiny(**changes) -> BackboneConfig:
    settings = dict(name="tiny", timm="vit_tiny_patch16_224", image_size=32, kwargs=TINY, pretrained=False)
    return BackboneConfig(**(settings | changes))


def test_backbones_for_predictions_share_nothing():
    first, second = (backbones.build(tiny(), 5, meta=True) for _ in range(2))
    assert first.head is not second.head and first.blocks[0].module is first.model.blocks[0]
    first.add("more", torch.nn.Linear(3, 3, device="meta"))
    first.model.requires_grad_(True)
    for other in (second, backbones.build(tiny(), 5, meta=True)):
        assert not hasattr(other.model, "s2a") and other.count()["trainable"] == 0
    assert backbones.build(tiny(), 7, meta=True).head.classes == 7


@pytest.mark.parametrize("name", NAMES)
def test_blocks_and_layouts(name):
    config = compose([f"backbone={name}"]).backbone
    made = backbones.build(config, 5, meta=True)
    assert (len(made.blocks), made.blocks[-1].output.layout) == BLOCKS[name]
    assert made.head.classes == 5
    assert {n for n, p in made.model.named_parameters() if p.requires_grad} == {
        f"{name}.{kind}" for name in made.head.layers for kind in ("weight", "bias")
    }
    default = timm.get_pretrained_cfg(config.timm)
    assert made.image.mean == tuple(default.mean)
    assert made.image.size == (config.image_size or default.input_size[-1])


@pytest.mark.parametrize("name", ["vit_t", "swin_t", "convnext_t", "resnet18", "mobilenetv3"])
def test_another_image_size(name):
    positions = []
    for size in (224, 128):
        made = backbones.build(compose([f"backbone={name}", f"backbone.image_size={size}"]).backbone, 5, meta=True)
        assert made.image.size == size
        positions.append(made.blocks[0].input.positions)
    assert positions[1] < positions[0]


def test_hidden_layouts_agree():
    tokens = torch.randn(2, 10, 6)
    prefixed = backbones.Hidden("tokens", (10, 6), prefix=1)
    prefix, patches = prefixed.split(tokens)
    assert torch.equal(prefix, tokens[:, :1])
    assert torch.equal(patches.flatten(2).transpose(1, 2), tokens[:, 1:]) and patches.shape == (2, 6, 3, 3)
    with pytest.raises(UserError, match="10 positions, and a block has 20"):
        prefixed.split(torch.cat([tokens, tokens], dim=1))
    first = backbones.Hidden("channels_first", (6, 3, 3))
    assert torch.equal(first.from_tokens(tokens[:, 1:]), patches)
    last = backbones.Hidden("channels_last", (3, 3, 6))
    assert torch.equal(last.split(last.from_tokens(tokens[:, 1:]))[1], patches)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_checkpoint_is_loaded_without_its_head(tmp_path, suffix):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=1000, **TINY)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
    else:
        safetensors.torch.save_file(source.state_dict(), path)
    made = backbones.build(tiny(pretrained=True, checkpoint=str(path)), 5)
    for name, tensor in made.model.state_dict().items():
        assert name.startswith("head.") or torch.equal(tensor, source.state_dict()[name]), name
    assert made.head.layers["head"].weight.shape == (5, 48)


def npz_of(model, path, drop=()):
    """Returns the arrays of Google's format for this model."""
    t = lambda x: x.detach().numpy().copy()
    width, heads = model.embed_dim, TINY["num_heads"]
    arrays = {
        "cls": t(model.cls_token),
        "embedding/kernel": t(model.patch_embed.proj.weight.permute(2, 3, 1, 0)),
        "embedding/bias": t(model.patch_embed.proj.bias),
        "Transformer/posembed_input/pos_embedding": t(model.pos_embed),
        "Transformer/encoder_norm/scale": t(model.norm.weight),
        "Transformer/encoder_norm/bias": t(model.norm.bias),
    }
    for i, block in enumerate(model.blocks):
        at = f"Transformer/encoderblock_{i}/"
        attention = at + "MultiHeadDotProductAttention_1/"
        for name, norm in (("LayerNorm_0", block.norm1), ("LayerNorm_2", block.norm2)):
            arrays |= {f"{at}{name}/scale": t(norm.weight), f"{at}{name}/bias": t(norm.bias)}
        for n, name in enumerate(("query", "key", "value")):
            rows = slice(n * width, (n + 1) * width)
            arrays[f"{attention}{name}/kernel"] = t(block.attn.qkv.weight[rows].T.reshape(width, heads, -1))
            arrays[f"{attention}{name}/bias"] = t(block.attn.qkv.bias[rows].reshape(heads, -1))
        arrays[f"{attention}out/kernel"] = t(block.attn.proj.weight.T.reshape(heads, -1, width))
        arrays[f"{attention}out/bias"] = t(block.attn.proj.bias)
        for n, layer in enumerate((block.mlp.fc1, block.mlp.fc2)):
            arrays |= {
                f"{at}MlpBlock_3/Dense_{n}/kernel": t(layer.weight.T),
                f"{at}MlpBlock_3/Dense_{n}/bias": t(layer.bias),
            }
    np.savez(path, **{k: v for k, v in arrays.items() if k not in drop})


def test_npz(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY)
    for p in source.parameters():
        p.data.normal_()
    npz_of(source, tmp_path / "vit.npz")
    made = backbones.build(tiny(pretrained=True, checkpoint=str(tmp_path / "vit.npz")), 5)
    for name, tensor in source.state_dict().items():
        assert torch.equal(made.model.state_dict()[name], tensor), name
    npz_of(source, tmp_path / "part.npz", drop=["embedding/bias"])
    with pytest.raises(UserError, match="lacks.*embedding/bias"):
        backbones.build(tiny(pretrained=True, checkpoint=str(tmp_path / "part.npz")), 5)


def damaged(tmp_path, kind):
    state = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY).state_dict()
    path = tmp_path / f"weights.{kind}"
    if kind == "npz":
        npz_of(timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY), path)
    elif kind == "pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("kind", ["safetensors", "pth", "npz"])
def test_a_truncated_checkpoint_is_refused(tmp_path, kind):
    path = damaged(tmp_path, kind)
    with pytest.raises(UserError, match=f"backbone.checkpoint={path}") as caught:
        backbones.build(tiny(pretrained=True, checkpoint=str(path)), 5)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_backbone_is_refused_with_its_keys(tmp_path):
    safetensors.torch.save_file(
        timm.create_model("resnet18", channels=(8, 8, 8, 8)).state_dict(), tmp_path / "r.safetensors"
    )
    with pytest.raises(UserError, match=r"missing: cls_token, .*unexpected: bn1.bias, .*conv1.weight") as caught:
        backbones.build(tiny(pretrained=True, checkpoint=str(tmp_path / "r.safetensors")), 5)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_width_is_refused_with_its_shapes(tmp_path):
    wide = timm.create_model("vit_tiny_patch16_224", **(TINY | dict(embed_dim=96)))
    safetensors.torch.save_file(wide.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"other shapes: .*\(96,\) for \(48,\)"):
        backbones.build(tiny(pretrained=True, checkpoint=str(tmp_path / "w.safetensors")), 5)


def test_code_in_a_pth_is_not_run(tmp_path):
    torch.save({"state_dict": print}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="can't be read as tensors"):
        backbones.build(tiny(pretrained=True, checkpoint=str(tmp_path / "code.pth")), 5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(timm="vit_tiny_patch16_225"), "vit_tiny_patch16_224"),
        (dict(timm="vit_tiny_patch16_224.no_such_tag"), "no_such_tag"),
        (dict(kwargs=dict(deepth=2)), "deepth"),
        (dict(checkpoint="nowhere.safetensors", pretrained=True), "no such file"),
        (dict(timm="mixer_s32_224", kwargs={}, image_size=96), "takes 224 only"),
    ],
)
def test_backbones_that_can_not_be_made(changes, message):
    with pytest.raises(UserError, match=message):
        backbones.build(tiny(**changes), 5)


def test_without_network_the_message_says_what_to_do():
    with pytest.raises(UserError, match=r"timm/vit_tiny_patch16_224.augreg_in21k.*backbone.checkpoint=FILE"):
        backbones.build(compose(["backbone=vit_t"]).backbone, 5)


def test_one_image_a_step_is_refused_where_a_batchnorm_has_one_value(capsys):
    words = ["backbone=resnet18", "backbone.pretrained=false", "method=full", "quant=none", "optim.batch_size=1"]
    config = compose([*words, "backbone.image_size=32"])
    with pytest.raises(
        UserError, match="optim.batch_size=1: method=full trains BatchNorms, and one of resnet18 then has one value"
    ):
        run.attach(config, backbones.build(config.backbone, 5, meta=True))
    config = compose([*words, "backbone.image_size=64"])
    made = backbones.build(config.backbone, 5)
    run.attach(config, made)
    assert made.model.bn1.running_mean.abs().sum() == 0, "nothing was moved by the look at it"


def test_the_fingerprint_knows_the_weights_and_not_the_head():
    torch.manual_seed(0)
    one = backbones.build(tiny(), 5)
    before = one.fingerprint()
    one.head.layers["head"].weight.data += 1
    assert one.fingerprint() == before
    one.model.norm.bias.data += 1
    assert one.fingerprint() != before


def test_real_weights(real_data):
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    config = compose(["backbone=vit_t", f"backbone.checkpoint={real_data}/weights/{name}", "backbone.image_size=112"])
    made = backbones.build(config.backbone, 5)
    state = safetensors.torch.load_file(real_data / "weights" / name)
    assert torch.equal(made.model.blocks[11].mlp.fc2.weight, state["blocks.11.mlp.fc2.weight"])
    assert made.model.pos_embed.shape == (1, 50, 192)  # resampled from 14 x 14 to 7 x 7, and the class token
