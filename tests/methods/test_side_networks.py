"""Side networks of the literature: what they compute, keep and train, and where gradients end."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import timm
import torch
from layouts import CLASSES, batch, defaults, loss_of, made_config, make, make_attached
from torch.nn import functional as F

import s2a_cli
from s2a_cli import methods
from s2a_cli.backbones import build
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.config.schema import BackboneConfig
from s2a_cli.memory import saved_bytes
from s2a_cli.methods import STRUCTURES
from s2a_cli.methods.parts.side_transformer import NarrowBlock, largest, prune_into
from s2a_cli.training.run import attach
from s2a_cli.training.step import Step, train_mode


def states(made, run):
    """What the first block takes and every block returns, hooks included, in a pass that `run()` makes."""
    seen = []
    handles = [made.blocks[0].module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    handles += [block.module.register_forward_hook(lambda _, __, h: seen.append(h)) for block in made.blocks]
    run()
    for handle in handles:
        handle.remove()
    return seen


def shake(made):
    """Moves all that is added off its start."""
    with torch.no_grad():
        for parameter in made.model.s2a.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("method", ["dtl", "dtl_plus"])
def test_dtl_computes_as_its_formula_says(method):
    """A block at a time, in float64: the sum of the low-rank maps, its swish, its convolution."""
    made = shake(make("vit", method, share=0.5))
    made.model.double().eval()
    h, *outputs = states(made, lambda: made.model(batch(made)[0].double()))
    (net,), side = made.model.s2a[method], 0.0
    plain = make("vit")
    plain.model.double().eval()
    for index, (block, output) in enumerate(zip(plain.blocks, outputs)):
        side = side + h @ net.downs[index].weight.T @ net.ups[index].weight.T
        added = side * torch.sigmoid(100.0 * side)
        if method == "dtl_plus":
            maps = added[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
            maps = F.conv2d(maps, net.fusion.weight, padding=1, groups=48)
            added = torch.cat([added[:, :1], maps.flatten(2).transpose(1, 2)], dim=1)
        h = block.module(h) + (added if index >= 1 else 0.0)  # 2 of 3 blocks, rounded up
        torch.testing.assert_close(output, h, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share, below", [(1.0, 0), (0.5, 1), (0.1, 2)])
def test_gradients_of_dtl_end_at_the_first_adapted_block(share, below):
    made = make("vit", "dtl", share=share)
    seen = states(made, lambda: loss_of(made).backward())
    assert [h.requires_grad for h in seen] == [False] * (1 + below) + [True] * (3 - below)


def test_bytes_that_dtl_keeps_below_the_first_adapted_block():
    """Of a block that nothing is added to: its input for A, and r channels for B."""
    few, more = (make("vit", "dtl", share=0.1, blocks=blocks) for blocks in ("last:2", "all"))
    kept = []
    for made in (few, more):
        train_mode(made.model)
        kept.append(saved_bytes(lambda made=made: loss_of(made), made.model))
    batch_size, positions, channels, rank = 4, 17, 48, 2
    assert kept[1] - kept[0] == 4 * batch_size * positions * (channels + rank)


def test_stages_in_which_dtl_adds_nothing_have_no_side_network():
    """Swin's first stage, of one of the three blocks."""
    (net,) = make("swin", "dtl").model.s2a["dtl"]
    assert [up.weight.shape for up in net.ups] == [(48, 2)] * 2
    assert len(make("swin", "dtl", share=1.0).model.s2a["dtl"]) == 2


def test_the_head_reads_the_ladder_as_its_formula_says():
    made = shake(make("vit", "lst"))
    made.model.double().eval()
    outputs = []
    h, *hs = states(made, lambda: outputs.append(made.model(batch(made)[0].double())))
    net = made.model.s2a["lst"]
    s = net.first(h)
    for h, down, alpha, block in zip(hs, net.downs, net.gates, net.blocks):
        mu = 1 / (1 + torch.exp(-alpha / 0.1))
        s = mu * s + (1 - mu) * down(h)
        q, k, v = block.qkv(block.norm1(s)).chunk(3, dim=-1)  # one head at this width, of 6
        s = s + block.proj(torch.softmax(q @ k.transpose(1, 2) / 6**0.5, -1) @ v)
        s = s + block.fc2(F.gelu(block.fc1(block.norm2(s))))
    head = made.model.head
    expected = F.linear(net.up(net.norm(s[:, 0])), head.weight, head.bias)
    torch.testing.assert_close(outputs[0], expected, rtol=1e-10, atol=1e-12)


def test_a_ladder_sends_no_gradient_through_the_backbone_and_trains_what_stands_beside_it():
    alone = make("vit", "lst")
    assert not any(h.requires_grad for h in states(alone, lambda: loss_of(alone).backward()))
    made = make("vit")
    methods.attach(compose(["method=[prompt,lst]", "method.prompt.rank=1"]).method, made)
    loss_of(made).backward()
    assert made.model.s2a["prompt"][0].B.grad.any()


def test_side_blocks_begin_as_pruned_blocks():
    """The rows of largest L1 norm, of every head as many, and the columns of the rows before."""
    made = make("vit", None)
    block, narrow = made.blocks[0], NarrowBlock(12, 48, 3)
    kept = torch.arange(12)
    end = prune_into(narrow, block, kept)
    attention, mlp = block.branch("attention"), block.branch("mlp")
    (_, qkv), (_, proj) = attention.linears
    norms = qkv.weight[:, :12].abs().sum(1).reshape(3, 3, 16).prod(0)  # query, key and value; heads; rows
    rows = torch.cat([16 * head + norms[head].topk(4).indices.sort().values for head in range(3)])
    assert torch.equal(narrow.norm1.weight, attention.norm.weight[:12])
    assert torch.equal(narrow.qkv.weight[12:24], qkv.weight[48:96][rows][:, :12])
    assert torch.equal(narrow.qkv.bias[24:], qkv.bias[96:][rows])
    out = proj.weight[:, rows].abs().sum(1).topk(12).indices.sort().values
    assert torch.equal(narrow.proj.weight, proj.weight[out][:, rows]) and torch.equal(
        narrow.norm2.bias, mlp.norm.bias[out]
    )
    assert torch.equal(narrow.fc2.bias, mlp.linears[1][1].bias[end])


def test_groups_that_do_not_divide_are_one():
    assert largest(torch.tensor([3.0, 1.0, 2.0, 0.0]), 2, groups=2).tolist() == [0, 2]
    assert largest(torch.tensor([3.0, 1.0, 2.0, 0.0]), 1, groups=2).tolist() == [0]


def test_meta_tokens_pass_one_block_each():
    """What a block returns is as long as before; no more of the head is read than the last stage has channels."""
    made = make("vit", "hst")
    seen, lengths = [], []
    for block in made.blocks:
        block.branch("attention").norm.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    seen = states(made, lambda: loss_of(made).backward())
    assert lengths == [18] * 3 and [h.shape[1] for h in seen[1:]] == [17] * 3
    grad = made.model.head.weight.grad
    assert grad[:, :12].any() and not grad[:, 12:].any() and grad.shape == (CLASSES, 48)
    trained = {n for n, p in made.model.named_parameters() if p.requires_grad and not n.startswith(("s2a.", "head."))}
    assert trained == {f"blocks.{i}.norm{j}.{t}" for i in range(3) for j in (1, 2) for t in ("weight", "bias")}


@pytest.mark.parametrize("method", ["dtl_plus", "hst"])
def test_side_networks_learn_the_same_where_blocks_are_recomputed(method):
    """Hooks of a block stay outside of what is run again."""
    losses = []
    for words in (["quant=none"], ["quant=none", "quant.recompute=block"]):
        made = make_attached("vit", method)
        train_mode(made.model)
        step = Step(compose([f"method={method}", *words]), torch.device("cpu"), made)
        optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=0.1)
        losses.append([step(made.model, optimizer, *batch(made.backbone)) for _ in range(2)])
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"heads": [3, 4]}, "divisors of method.widths"),
        ({"heads": [2]}, "one a stage"),
        ({"widths": [8, 8, 8, 8], "heads": [1, 1, 1, 1]}, "at most 3 stages"),
        ({"widths": [8, 64]}, "at most 48 channels"),
    ],
)
def test_settings_of_a_hierarchical_side_network_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make("vit", "hst", **settings)


def test_blocks_that_take_no_further_tokens_are_refused():
    """BEiT's attention has a bias for each pair of positions."""
    beit = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2, use_rel_pos_bias=True)
    config = BackboneConfig(name="beit", timm="beit_base_patch16_224", pretrained=False, image_size=32, kwargs=beit)
    made = build(config, CLASSES)
    with pytest.raises(UserError, match="no further tokens"):
        STRUCTURES["hst"](made_config("vit", "hst")).attach(made)


@pytest.mark.parametrize("names", ["prompt,hst", "hst,prompt", "hst,dtl", "hst,side", "lst,bias", "dtl,lst"])
def test_side_networks_beside_other_structures(names):
    made, settings = make("vit"), []
    for name in names.split(","):
        for key, value in defaults("vit", name).items():
            settings.append(f"method.{name}.{key}={str(value).replace(' ', '')}")
    attached = methods.attach(compose([f"method=[{names}]", *settings]).method, made)
    seen = states(made, lambda: loss_of(made).backward())
    assert [h.shape[1] for h in seen[1:]] == [17] * 3
    assert attached.feature_head is None


@pytest.mark.parametrize("method", ["lst", "qst"])
def test_features_are_read_once(method):
    """Those of a pass are not handed to a later call of the head alone, of another image."""
    made = make("vit", method)
    model, (images, _) = made.model.eval(), batch(made)
    with torch.no_grad():
        assert torch.equal(model.forward_head(model.forward_features(images)), model(images))
        model.forward_head(model.forward_features(images))
    with pytest.raises(UserError, match="call the model"):
        model.head(torch.randn(len(images), 48))


def test_both_heads_of_a_distilled_model_read_a_side_network():
    sizes = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_classes=CLASSES)
    model = timm.create_model("deit_tiny_distilled_patch16_224", **sizes).eval()
    network = s2a_cli.attach(model, "lst").model.get_submodule("s2a.lst")
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(2, 3, 32, 32))).all()
    assert network._features == ()


def test_the_head_reads_one_side_network_only():
    small = ["method.hst.widths=[8]", "method.hst.heads=[1]"]
    with pytest.raises(UserError, match="one side network only"):
        methods.attach(compose(["method=[lst,hst]", *small]).method, make("vit"))


def test_features_are_not_cached_where_a_structure_of_a_list_can_not_read_them():
    made = make("vit")
    attached = methods.attach(compose(["method=[side,lst]", "method.side.width=4"]).method, made)
    assert not attached.adapts and attached.feature_head is None


@pytest.mark.parametrize("word, refused", [("quant=tiny", False), ("quant=int4", False), ("optim.micro_batch=2", True)])
def test_blocks_may_run_in_parts_where_only_a_side_network_has_batchnorms(word, refused):
    settings = [f"method.{key}={value}".replace(" ", "") for key, value in defaults("vit", "hst").items()]
    config = compose(["method=hst", *settings, word])
    with pytest.raises(UserError, match="trains BatchNorms") if refused else nullcontext():
        attach(config, make("vit"))


@pytest.mark.parametrize("method", ["lst", "qst", "side_tuning", "unipt", "s2a_paper"])
def test_a_head_that_is_called_alone_says_what_to_call(method):
    made = make("vit", method)
    images, _ = batch(made)
    before = made.model.eval()(images)
    with pytest.raises(UserError, match="call the model, not its"):
        made.model.get_submodule("head")(torch.randn(4, 48))
    assert torch.equal(made.model(images), before)


def test_blocks_that_are_unfrozen_later_learn_through_a_bypass():
    attached = s2a_cli.attach(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3), "res_tuning_bypass")
    block = attached.blocks[-1].requires_grad_(True)
    attached.model.train()(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in block.parameters())
