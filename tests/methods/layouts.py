"""Tiny backbones of every layout of hidden states, made what a method trains, and a batch for them."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from s2a_cli import backbones
from s2a_cli.activations import REFERENCE, compress_activations
from s2a_cli.config.schema import BackboneConfig, QuantConfig
from s2a_cli.methods import STRUCTURES, Attachment
from s2a_cli.methods.parts.deep_supervision import losses_of

BACKBONES = {
    "vit": dict(
        timm="vit_tiny_patch16_224", image_size=32, kwargs=dict(img_size=32, patch_size=8, embed_dim=48, depth=3)
    ),
    "swin": dict(
        timm="swin_tiny_patch4_window7_224",
        image_size=32,
        kwargs=dict(img_size=32, window_size=4, embed_dim=24, depths=(1, 2), num_heads=(2, 4), drop_path_rate=0.0),
    ),
    "resnet": dict(timm="resnet18", image_size=32, kwargs=dict(channels=(16, 24, 32, 48), layers=(1, 1, 1, 2))),
    "convnext": dict(timm="convnext_atto", image_size=32, kwargs=dict(depths=(1, 1, 1, 2), dims=(16, 24, 32, 48))),
    "mobilenet": dict(timm="mobilenetv3_small_050", image_size=64, kwargs={}),
}
CLASSES = 7


def make(backbone: str, method: str | None = None, **settings):
    """A backbone, with a structure attached to it where one is named."""
    return make_attached(backbone, method, **settings).backbone


def make_attached(backbone: str, method: str | None = None, **settings) -> Attachment:
    if method and (needs := STRUCTURES[method].needs):
        pytest.importorskip(needs, reason=f"method={method} needs {needs}, which is not installed")
    torch.manual_seed(0)
    made = backbones.build(BackboneConfig(name=backbone, pretrained=False, **BACKBONES[backbone]), CLASSES)
    randomise(made.model)
    if method is None:
        return Attachment(made)
    return STRUCTURES[method](made_config(backbone, method, **settings)).attach(made)


def made_config(backbone: str, method: str, **settings):
    config = OmegaConf.structured(STRUCTURES[method].Settings())
    return OmegaConf.merge(config, defaults(backbone, method), settings)


def defaults(backbone: str, method: str) -> dict:
    """Small enough for these tiny widths and maps."""
    side, prompt = {"width": 4}, {"rank": 1}
    tuners = {
        "boft": {"boft_n_butterfly_factor": 2},
        "c3a": {"block_size": 8},
        "fourierft": {"n_frequency": 20, "scaling": 10.0},
        "miss": {"r": 4},
        "oft": {"oft_block_size": 4},
        "road": {"group_size": 8},
        "vera": {"r": 8},
    }
    found = {name: {"peft": fields} for name, fields in tuners.items()} | {
        "side": side,
        "prompt": prompt,
        "s2a": {"side": side, "prompt": prompt},
        "s2a_paper": {"prompt": prompt, "side": {"pooled": 2}},
        "qst": {"reduction": 4, "rank": 4},
        "hst": {"widths": [8, 12], "heads": [2, 4]},
        "vpt_shallow": {"tokens": 3},
        "vpt_deep": {"tokens": 3},
        # the second step of what stands before a factor of 0 is not rounded away
        "fact_tt": {"rank": 4, "scale": 10.0},
        "fact_tk": {"rank": 4, "scale": 10.0},
        "repadapter": {"scale": 10.0},
        "head2toe": {"select_after": 1},
    }
    return found.get(method, {})


def randomise(model):
    """Weights and statistics as of a trained model: no zero gammas, no unit variances."""
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.1 * torch.randn_like(p)
    for name, b in model.named_buffers():
        if name.endswith("running_var"):
            b.data.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            b.data.normal_(std=0.1)


def batch(backbone):
    generator = torch.Generator().manual_seed(1)
    size = backbone.image.size
    return torch.randn(4, 3, size, size, generator=generator), torch.randint(CLASSES, (4,), generator=generator)


def loss_of(backbone, quant=REFERENCE):
    images, targets = batch(backbone)
    with compress_activations(quant):
        return losses_of(backbone.model(images), targets).sum()


def quant(bits):
    return QuantConfig(
        name=f"int{bits}", lossless=bits is not None, bits=bits, pointwise=bits, norm=bits, attention=bits, softmax=bits
    )


each_backbone = pytest.mark.parametrize("backbone", BACKBONES)
