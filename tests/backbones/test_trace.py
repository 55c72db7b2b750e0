"""Heads, blocks and layouts of models of every family, and the messages where one can't be found."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from torch import nn

from s2a_cli import backbones
from s2a_cli.backbones.trace import LayoutError, find_blocks, images_of, layouts, trace
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.config.schema import BackboneConfig
from s2a_cli.data.transforms import ImageConfig
from s2a_cli.methods import STRUCTURES
from s2a_cli.training import run

CLASSES = 7
# model -> blocks; layout, shape and prefix tokens at the first block's input and at the last one's output; layers of
# the head
KNOWN = {
    "test_vit": (6, "tokens (101, 64) 1", "tokens (101, 64) 1", 1),
    "vit_tiny_patch16_dinov3_qkvb": (12, "tokens (261, 192) 5", "tokens (261, 192) 5", 1),
    "swin_tiny_patch4_window7_224": (12, "channels_last (56, 56, 96) 0", "channels_last (7, 7, 768) 0", 1),
    "test_convnext": (9, "channels_first (24, 40, 40) 0", "channels_first (64, 5, 5) 0", 1),
    "test_resnet": (4, "channels_first (32, 40, 40) 0", "channels_first (96, 5, 5) 0", 1),
    "volo_d1_224": (18, "channels_last (28, 28, 192) 0", "channels_last (14, 14, 384) 0", 2),
    "tiny_vit_5m_224": (12, "channels_first (64, 56, 56) 0", "channels_last (7, 7, 320) 0", 1),
    "xcit_nano_12_p8_224": (12, "tokens (784, 128) 0", "tokens (784, 128) 0", 1),  # the class token joins later
    "convit_tiny": (12, "tokens (196, 192) 0", "tokens (197, 192) 1", 1),  # it joins behind the tenth block
    "cait_xxs24_224": (24, "tokens (196, 192) 0", "tokens (196, 192) 0", 1),
    "levit_128s": (9, "tokens (196, 128) 0", "tokens (16, 384) 0", 2),
    "deit_tiny_distilled_patch16_224": (12, "tokens (198, 192) 2", "tokens (198, 192) 2", 2),
    # its head is a 1x1 convolution
    "resnetv2_18": (8, "channels_first (64, 56, 56) 0", "channels_first (512, 7, 7) 0", 1),
    "efficientformer_l1": (15, "channels_first (48, 56, 56) 0", "tokens (49, 448) 0", 2),
    "mvitv2_tiny": (10, "tokens (3136, 96) 0", "tokens (49, 768) 0", 1),
    "pvt_v2_b0": (8, "tokens (3136, 32) 0", "tokens (49, 256) 0", 1),
    # these are its patches, not its pixels, which are as many tokens of another length
    "tnt_s_legacy_patch16_224": (12, "tokens (197, 384) 1", "tokens (197, 384) 1", 1),
    "crossvit_tiny_240": (3, "tokens (401, 96) 1", "tokens (401, 96) 1", 2),
    "coat_tiny": (14, "tokens (3137, 152) 1", "tokens (785, 152) 1", 1),
    "densenet121": (4, "channels_first (64, 56, 56) 0", "channels_first (1024, 7, 7) 0", 1),
    "inception_v3": (11, "channels_first (192, 35, 35) 0", "channels_first (2048, 8, 8) 0", 1),
    "poolformerv2_s12": (12, "channels_first (64, 56, 56) 0", "channels_first (512, 7, 7) 0", 1),
    "hrnet_w18_small": (8, "channels_first (64, 56, 56) 0", "channels_first (1024, 7, 7) 0", 1),
    "vgg11": (8, "channels_first (3, 224, 224) 0", "channels_first (512, 14, 14) 0", 1),
    "efficientvim_m1": (6, "channels_first (128, 14, 14) 0", "channels_first (320, 4, 4) 0", 4),
    "test_coatnet": (5, "channels_first (32, 80, 80) 0", "channels_first (128, 5, 5) 0", 1),
}


def built(model: str, **settings) -> backbones.Backbone:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return backbones.build(BackboneConfig(name=model, timm=model, pretrained=False, **settings), CLASSES, meta=True)


def said(hidden: backbones.Hidden) -> str:
    return f"{hidden.layout} {hidden.shape} {hidden.prefix}"


@pytest.mark.parametrize("model", KNOWN)
def test_what_is_found(model):
    made = built(model)
    first, last = made.blocks[0].input, made.blocks[-1].output
    assert (len(made.blocks), said(first), said(last), len(made.head.layers)) == KNOWN[model]
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{kind}" for name in made.head.layers for kind in ("weight", "bias")}
    assert made.head.classes == CLASSES and all(layer.weight.shape[0] == CLASSES for layer in made.head.layers.values())


def taken(module: nn.Module) -> int | None:
    """Returns how many channels a layer takes, or None for a module that does not tell."""
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    return next(
        (
            getattr(module, name)
            for name in ("in_features", "in_channels", "num_features", "num_channels")
            if hasattr(module, name)
        ),
        None,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", timm.list_modules())
def test_no_layout_contradicts_a_blocks_own_layers(family):
    """Takes a small model of each family."""
    names = timm.list_models(module=family)
    named = [
        name
        for name in names
        if any(word in name for word in ("test_", "_atto", "_nano", "_micro", "_xxs", "_pico", "tiny", "_s0", "_t0"))
    ]
    for name in (*named, *names):
        try:
            made = built(name, kwargs={"layers": (1, 1, 2, 1)} if family == "sequencer" else {})  # LSTMs take long
            break
        except UserError:
            continue
    for block in made.blocks:
        if own := {width for module in block.module.modules() if (width := taken(module))}:
            assert block.input.channels in own, f"{name}: {block.name} {block.input} {sorted(own)}"
    for before, after in zip(made.blocks, made.blocks[1:]):
        if before.output.shape == after.input.shape:
            assert before.output.layout == after.input.layout, f"{name}: {after.name}"


class Plain(nn.Module):
    """No repeated part."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))


def wrapped(model: nn.Module, size: int = 32) -> backbones.Backbone:
    image = ImageConfig(size, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
    return backbones.Backbone(model, image, backbones.Head({"head": model.head}, CLASSES))


def test_what_needs_no_blocks_runs_without():
    for method in ("full", "bias", "linear"):
        made = wrapped(Plain())
        assert made.block_modules == []
        STRUCTURES[method](compose([f"method={method}"]).method).attach(made)
        assert made.count()["trainable"] > 0 or method == "linear"
    for method in ("prompt", "side", "s2a", "bias"):
        words = ["method.blocks=last:1"] if method == "bias" else []
        with pytest.raises(
            UserError,
            match="no repeated blocks were found in Plain; what needs no blocks works: method=full, linear, or bias",
        ):
            STRUCTURES[method](compose([f"method={method}", *words]).method).attach(wrapped(Plain()))


def test_recomputation_without_blocks_is_refused():
    config = compose(["method=bias", "quant=tiny"])
    with pytest.raises(UserError, match="quant.recompute=block: .*no repeated blocks"):
        run.attach(config, wrapped(Plain()))
    run.attach(compose(["method=bias", "quant=int4"]), wrapped(Plain()))


class Block(nn.Module):
    """Mixes both dimensions of [B, 16, 16, 16]; no layer says which of them has the channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.eye(16)), nn.Parameter(torch.eye(16))

    def forward(self, x):
        return x + torch.einsum("bcij,cd,jk->bdik", x, self.a, self.b)


class Ambiguous(Plain):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = (
            nn.Conv2d(3, 16, 17),
            nn.Sequential(Block(), Block()),
            nn.Linear(16, CLASSES),
        )

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).permute(0, 2, 3, 1).contiguous()).mean((2, 3)))


def test_a_layout_that_can_not_be_known_is_refused():
    model = Ambiguous()
    seen = trace(model, images_of(32))
    blocks = find_blocks(model, seen)
    assert [block.name for block in blocks] == ["blocks.0", "blocks.1"]
    with pytest.raises(LayoutError, match=r"the layout of \[16, 16, 16\] at blocks.0 can't be told"):
        layouts(blocks, seen, 0)
    made = wrapped(model)
    assert len(made.block_modules) == 2, "they can be recomputed all the same"
    with pytest.raises(UserError, match="Ambiguous: the layout of"):
        STRUCTURES["side"](compose(["method=side"]).method).attach(made)


def test_a_model_without_a_classifier_gets_one():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks = (
                nn.Conv2d(3, 8, 4, 4),
                nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)),
            )
            self.pretrained_cfg = {"input_size": (3, 32, 32)}

        def forward(self, x):
            x = self.stem(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = block(x)
            return x

    from s2a_cli.backbones.build import _classified

    model = _classified(Features(), 32, CLASSES)
    made = wrapped(model)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, CLASSES) and list(made.head.layers) == ["head"]
    STRUCTURES["s2a"](compose(["method=s2a", "method.prompt.rank=2", "method.side.width=2"]).method).attach(made)
    made.model(torch.randn(2, 3, 32, 32)).sum().backward()


def test_a_prompt_has_a_lower_rank_where_there_is_no_room(capsys):
    made = built("vgg11")
    STRUCTURES["prompt"](compose(["method=prompt"]).method).attach(made)
    assert [tuple(p.shape) for p in made.model.s2a["prompt"].parameters()][:2] == [(224 * 224, 3), (3, 3)]
    assert (
        capsys.readouterr().err
        == "s2a: the low-rank prompt has a lower rank than 8 where channels or positions are few: 3 at features.0\n"
    )
    with pytest.raises(UserError, match="rank=1000 of the low-rank prompt is larger than any block"):
        STRUCTURES["prompt"](compose(["method=prompt", "method.rank=1000"]).method).attach(built("vgg11"))


def test_a_model_that_returns_no_logits_is_refused():
    class Pair(Plain):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(UserError, match="Pair does not return one logit a class"):
        wrapped(Pair())
