"""Tuning of a part of the weights, prompt tokens, FacT, and S2A as its paper has it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from layouts import batch, loss_of, made_config, make, make_attached
from omegaconf import OmegaConf
from torch.nn import functional as F

from s2a_cli import backbones, methods
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.config.schema import BackboneConfig
from s2a_cli.memory import saved_bytes
from s2a_cli.methods import STRUCTURES
from s2a_cli.training.step import Step, train_mode

VPT = pytest.mark.parametrize("method", ["vpt_shallow", "vpt_deep"])
FACT = pytest.mark.parametrize("method", ["fact_tt", "fact_tk"])


def trained(made) -> set[str]:
    """Names of the trained parameters, without the head's."""
    return {name for name, p in made.model.named_parameters() if p.requires_grad and not made.head.holds(name)}


def moved(made, size: float = 0.3):
    """Moves all that a method added away from where it starts."""
    generator = torch.Generator().manual_seed(4)
    for parameter in made.model.s2a.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return made


# Parts of the weights


def test_partial_k_trains_the_last_blocks_and_the_norm():
    names = [name for name, _ in make("vit").model.named_parameters()]
    for k in (1, 2):
        last = tuple(f"blocks.{3 - number}." for number in range(1, k + 1))
        assert trained(make("vit", "partial", k=k)) == {n for n in names if n.startswith((*last, "norm."))}
    with pytest.raises(UserError, match="last:1 to last:3"):
        make("vit", "partial", k=4)


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_rules_of_the_public_code(backbone):
    """They go by the names of parameters."""
    names = {n for n, _ in make(backbone).model.named_parameters() if not n.startswith("head.fc.")} - {
        *("head.weight", "head.bias"),
    }
    assert trained(make(backbone, "bitfit")) == {n for n in names if "bias" in n}
    assert trained(make(backbone, "layernorm")) == {n for n in names if "norm" in n}


def test_bitfit_is_bias_tuning_and_tables_of_relative_positions():
    assert trained(make("vit", "bitfit")) == trained(make("vit", "bias"))
    more = trained(make("swin", "bitfit")) - trained(make("swin", "bias"))
    assert len(more) == 3 and all(name.endswith("relative_position_bias_table") for name in more)


# Prompt tokens


def with_prompts(model, images, prompts):
    """A ViT written out: prompts (of each block, or of the first alone) behind the class token."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for index, block in enumerate(model.blocks):
        if index < len(prompts):
            patches = x[:, 1 if index == 0 else 1 + len(prompts[0]) :]
            x = torch.cat([x[:, :1], prompts[index].expand(len(x), -1, -1), patches], dim=1)
        x = block(x)
    return model.forward_head(model.norm(x))


@VPT
def test_prompts_are_further_tokens_of_the_blocks(method):
    made, plain = moved(make("vit", method)), make("vit").model
    plain.load_state_dict({n: t for n, t in made.model.state_dict().items() if not n.startswith("s2a.")})
    prompts = [p.double() for p in made.model.s2a.parameters()]
    assert len(prompts) == (3 if method == "vpt_deep" else 1)
    with torch.no_grad():
        expected = with_prompts(plain.double().eval(), batch(made)[0].double(), prompts)
        torch.testing.assert_close(made.model.eval()(batch(made)[0]).double(), expected, rtol=1e-5, atol=1e-6)


@VPT
def test_prompts_begin_within_the_bound_of_the_patch_embedding(method):
    first = next(make("vit", method, tokens=200).model.s2a.parameters())
    bound = math.sqrt(6 / (3 * 8 * 8 + 48))
    assert 0.99 * bound < first.abs().max() <= bound


@VPT
def test_the_side_branch_reads_the_tokens_of_the_image(method):
    """What has become of the prompts is taken off before anything reads a block's output."""
    made, seen = make("vit"), []
    words = [f"method=[{method},side,prompt]", "method.side.width=4", "method.prompt.rank=1"]
    attached = methods.attach(compose([*words, f"method.{method}.tokens=3"]).method, made)
    for block in made.blocks:
        block.module.register_forward_hook(lambda _, __, y, hidden=block.output: seen.append(hidden.of(y).shape[1]))
    copy.deepcopy(attached)
    loss_of(made).backward()
    assert seen == [block.output.positions for block in made.blocks]
    assert all(p.grad is not None for p in made.model.parameters() if p.requires_grad)


@VPT
def test_recomputed_blocks_have_the_gradients_of_prompts(method):
    def gradients(*words):
        made = make_attached("vit", method)
        train_mode(made.model)
        optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=0.0)
        optimizer.zero_grad = lambda set_to_none: None
        torch.manual_seed(2)
        step = Step(compose([f"method={method}", *words]), torch.device("cpu"), made)
        step(made.model, optimizer, *batch(made.backbone))
        return [p.grad for p in made.model.s2a.parameters()]

    for found, wanted in zip(gradients("quant=exact", "quant.chunks=2"), gradients("quant=none"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-9)


def test_prompts_keep_what_their_tokens_cost():
    """The bytes kept are a linear function of the number of tokens: prompts need nothing of their own."""
    kept = []
    for tokens in (4, 8, 12):
        made = make("vit", "vpt_deep", tokens=tokens, dropout=0.0)
        train_mode(made.model)
        kept.append(saved_bytes(lambda made=made: loss_of(made), made.model))
    assert kept[2] - kept[1] == kept[1] - kept[0]


@pytest.mark.parametrize("timm", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "hiera_tiny_224", "pit_ti_224"])
def test_blocks_that_know_the_number_of_tokens_are_refused(timm):
    kwargs = {"depth": 2} if timm.startswith(("beit", "eva")) else {}
    made = backbones.build(BackboneConfig(name=timm, timm=timm, pretrained=False, kwargs=kwargs), 7, meta=True)
    structure = STRUCTURES["vpt_shallow"](made_config("vit", "vpt_shallow"))
    with pytest.raises(UserError, match="widths" if timm.startswith("pit") else "take no more tokens"):
        structure.attach(made)


# FacT


def update(factors, kind: str, name: str, block: int, rank: int) -> torch.Tensor:
    """s V S U of one layer as a matrix, written out as in the public code for a ViT; factors by name, float64."""
    u, v = factors["0.U.weight"], factors["0.V.weight"]
    place = ("qkv", "proj", "fc1", "fc2").index(name)
    parts = (3, 1, 4, 4)[place]
    if kind == "fact_tt":
        cores = [*factors[f"0.cores.{4 * block + place}.weight"].split(rank, dim=1 if name == "fc2" else 0)]
    else:
        start = 12 * block + (0, 3, 4, 8)[place]
        mixed = torch.einsum("abk,kn->abn", factors["0.C"], factors["0.P"][:, start : start + parts])
        if name in ("qkv", "proj"):
            cores = [mixed[:, :, part].T for part in range(parts)]
        else:
            wide = mixed.reshape(rank, parts * rank)
            wide = wide if name == "fc2" else wide.T
            cores = [*wide.split(rank, dim=1 if name == "fc2" else 0)]
    return 10.0 * torch.cat([v @ core @ u for core in cores], dim=1 if name == "fc2" else 0)


@FACT
def test_fact_adds_products_of_its_factors_to_the_weights(method):
    made, plain = moved(make("vit", method), 0.1), make("vit").model
    plain.load_state_dict({n: t for n, t in made.model.state_dict().items() if not n.startswith("s2a.")})
    plain.double().eval()
    factors = {name: t.double() for name, t in made.model.s2a[method].state_dict().items()}
    with torch.no_grad():
        for index, block in enumerate(plain.blocks):
            for name, layer in zip(
                ("qkv", "proj", "fc1", "fc2"), (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
            ):
                layer.weight += update(factors, method, name, index, 4)
        images = batch(made)[0]
        expected = plain(images.double())
        torch.testing.assert_close(made.model.eval()(images).double(), expected, rtol=1e-4, atol=1e-5)


@FACT
def test_blocks_of_one_width_share_factors(method):
    groups = make("swin", method).model.s2a[method]
    assert [tuple(group.U.weight.shape) for group in groups] == [(4, 24), (4, 48)]
    assert [len(group.tiles) for group in groups] == [4, 8]


def test_fact_needs_an_attention_of_four_linear_maps():
    config = BackboneConfig(name="beit", timm="beit_base_patch16_224", pretrained=False, kwargs={"depth": 2})
    with pytest.raises(UserError, match="fact_tt: does not fit Beit: .* four linear maps"):
        STRUCTURES["fact_tt"](made_config("vit", "fact_tt")).attach(backbones.build(config, 7, meta=True))


# S2A as its paper has it


def test_s2a_of_the_paper_has_its_codes_and_its_share_of_parameters():
    assert compose(["method=s2a_paper"]).quant.name == "paper"
    assert compose(["method=s2a_paper", "quant=int8"]).quant.name == "int8"
    config = BackboneConfig(name="vit_b", timm="vit_base_patch16_224.orig_in21k", pretrained=False)
    made = backbones.build(config, 100, meta=True)
    STRUCTURES["s2a_paper"](OmegaConf.structured(STRUCTURES["s2a_paper"].Settings())).attach(made)
    ladder = sum(p.numel() for p in made.model.s2a["ladder"].parameters())
    layer = 96 * 4 * 96 + 96 + 2 * 96  # of width 768 / 8: queries, keys, values and output, its bias, a LayerNorm
    assert ladder == 12 * layer + 2 * 96 + 97 * 768
    assert made.count()["trainable"] == 102_912 + 12 * 8 * (197 + 768) + ladder and made.count()["percent"] <= 0.9


def test_the_ladder_adds_to_the_feature_of_the_head():
    """s_l = s_(l-1) + g_l(CAP(h_l) + s_(l-1)), in float64."""
    made = moved(make("vit", "s2a_paper", side=dict(pooled=4, grid=2)), 0.2)
    states, features, ladder = [], [], copy.deepcopy(made.model.s2a["ladder"]).double()
    for block in made.blocks:
        block.module.register_forward_hook(lambda _, __, y: states.append(y.detach().double()))
    made.model.norm.register_forward_hook(lambda _, __, y: features.append(y[:, 0].detach().double()))
    with torch.no_grad():
        logits = made.model.eval()(batch(made)[0])
        s = torch.zeros(4, 5, 12, dtype=torch.float64)
        for h, g in zip(states, ladder.layers):
            patches = h[:, 1:].unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)  # of 4 x 4 positions
            z = s + torch.cat([h[:, :1], patches], dim=1).unflatten(-1, (12, 4)).mean(-1)
            q, k, v = F.linear(g.norm(z), g.qkv.weight).unflatten(-1, (3, 4, 3)).permute(2, 0, 3, 1, 4)
            mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(3), -1) @ v
            s = s + g.out(mixed.transpose(1, 2).flatten(2))
        feature = features[0] + ladder.merges[0](ladder.norm(s).mean(1))
        expected = F.linear(feature, made.model.head.weight.double(), made.model.head.bias.double())
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backbone", ["vit", "swin", "resnet"])
def test_the_ladder_leaves_the_gradients_of_the_backbone_alone(backbone):
    """While its projection is zero: one loss, and nothing of the ladder is back-propagated into a block."""
    made, other = make_attached(backbone, "s2a_paper"), make_attached(backbone, "bias")
    for one in (made, other):
        train_mode(one.model)
        loss_of(one.backbone).backward()
    assert made.model(batch(made.backbone)[0]).ndim == 2 and not made.auxiliary
    wanted = {n: p.grad for n, p in other.model.named_parameters() if p.grad is not None}
    found = dict(made.model.named_parameters())
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name].grad, grad, rtol=1e-4, atol=1e-7)


# QST


def test_the_side_network_mixes_its_state_with_what_it_reads_and_with_the_feature():
    made = moved(make("vit", "qst"), 0.1)
    states, features, network = [], [], copy.deepcopy(made.model.s2a["qst"]).double()
    made.blocks[0].module.register_forward_pre_hook(lambda _, args: states.append(args[0].detach().double()))
    for block in made.blocks:
        block.module.register_forward_hook(lambda _, __, y: states.append(y.detach().double()))
    made.model.norm.register_forward_hook(lambda _, __, y: features.append(y[:, 0].detach().double()))

    def narrow(index, h):
        down = network.downs[index]
        return F.layer_norm(F.silu(h @ down.A.weight.T) @ down.B.weight.T, (12,), down.norm.weight, down.norm.bias)

    with torch.no_grad():
        logits = made.model.eval()(batch(made)[0])
        s = narrow(0, states[0])
        for index, h in enumerate(states[1:]):
            z = torch.sigmoid(network.gates[index])
            s = network.blocks[index](z * s + (1 - z) * narrow(index, h))
        z = torch.sigmoid(network.gate)
        feature = z * features[0] + (1 - z) * network.up(network.norm(s))[:, 0]
        expected = F.linear(feature, made.model.head.weight.double(), made.model.head.bias.double())
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)
