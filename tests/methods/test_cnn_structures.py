"""Conv-Adapter, residual adapters, TinyTL, Side-Tuning, Res-Tuning, UniPT, Head2Toe: formulas, and what is refused."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from layouts import CLASSES, batch, loss_of, make, make_attached, quant
from torch import nn
from torch.nn import functional as F

import s2a_cli
from s2a_cli import methods
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.memory import saved_bytes
from s2a_cli.methods.head2toe import PooledState
from s2a_cli.methods.side_tuning import alexnet_features
from s2a_cli.training import checkpoints
from s2a_cli.training.step import Step, train_mode


def double(backbone: str, method: str, **settings):
    """In float64 and evaluation, with weights as of a trained one; and images."""
    made = make(backbone, method, **settings)
    model, generator = made.model.double().eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.s2a.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made, batch(made)[0].double()


def calls(module: nn.Module, model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a module is called with in a forward pass of the model, and what it returns after all hooks."""
    seen = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append((args[0].clone(), output.clone())))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("backbone, index, name", [("resnet", 1, "conv1"), ("convnext", 0, "conv_dw")])
def test_a_conv_adapter_stands_beside_the_convolution(backbone, index, name):
    made, images = double(backbone, "conv_adapter")
    adapter, conv = made.model.s2a["conv_adapter"][index], getattr(made.blocks[index].module, name)
    x, y = calls(conv, made.model, images)
    act = F.relu if backbone == "resnet" else F.gelu
    low = F.conv2d(x, adapter.down.weight, adapter.down.bias, conv.stride, conv.padding, groups=adapter.down.groups)
    high = F.conv2d(act(low), adapter.up.weight, adapter.up.bias) * adapter.scale.view(-1, 1, 1)
    plain = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)
    torch.testing.assert_close(y, plain + high)


def test_a_conv_adapter_stands_beside_the_whole_block_of_a_mobilenet():
    made, images = double("mobilenet", "conv_adapter")
    block, adapter, plain = made.blocks[1], made.model.s2a["conv_adapter"][1], copy.deepcopy(make("mobilenet").model)
    x, y = calls(block.module, made.model, images)
    with torch.no_grad():
        torch.testing.assert_close(y, plain.double().eval().get_submodule(block.name)(x) + adapter(x))
    assert adapter.down.stride == (2, 2) and adapter.down.kernel_size == (3, 3)


def test_groups_of_a_conv_adapter_are_of_one_size():
    made = make("mobilenet", "conv_adapter", reduction=3)
    for block, adapter in zip(made.blocks, made.model.s2a["conv_adapter"]):
        assert adapter.down.in_channels % adapter.down.groups == 0 and adapter.down.groups <= block.input.channels // 3


def test_a_parallel_adapter_merges_and_a_series_adapter_does_not():
    made, images = double("resnet", "residual_adapter", norms=False)
    block, adapter = made.blocks[1].module, made.model.s2a["residual_adapter"][2].adapter
    x, y = calls(block.conv1, made.model, images)
    torch.testing.assert_close(y, F.conv2d(x, block.conv1.weight, None, 2, 1) + F.conv2d(x, adapter.weight, None, 2))
    assert not block.bn1.weight.requires_grad
    with pytest.raises(UserError, match="a series adapter has a bias"):
        make_attached("resnet", "residual_adapter", position="series").merge()


def test_a_series_adapter_normalises_by_the_batch():
    made, images = double("resnet", "residual_adapter", position="series")
    train_mode(made.model)
    block, series = made.blocks[1].module, made.model.s2a["residual_adapter"][2]
    x, y = calls(block.conv1, made.model, images)
    z = F.conv2d(x, block.conv1.weight, None, 2, 1)
    normal = F.batch_norm(z, None, None, series.norm.weight, series.norm.bias, training=True)
    torch.testing.assert_close(y, z + F.conv2d(normal, series.adapter.weight))


def test_a_lite_residual_module_works_at_half_the_resolution():
    made, images = double("mobilenet", "lite_residual")
    block, lite, plain = made.blocks[2], made.model.s2a["lite_residual"][2], copy.deepcopy(make("mobilenet").model)
    x, y = calls(block.module, made.model, images)

    def standard(w):
        return (w - w.mean((1, 2, 3), True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)

    def norm(h, n):
        return F.group_norm(h, n.num_groups, n.weight, n.bias)

    h = F.conv2d(F.avg_pool2d(x, 2), standard(lite.conv1.weight), padding=1, groups=2)  # k = 3 on a map of 4 x 4
    h = norm(F.conv2d(F.relu(norm(h, lite.norm1)), standard(lite.conv2.weight)), lite.norm2)
    with torch.no_grad():
        expected = plain.double().eval().get_submodule(block.name)(x) + F.interpolate(h, (8, 8), mode="bilinear")
    torch.testing.assert_close(y, expected)
    assert not lite.norm2.bias.requires_grad and lite.norm1.bias.requires_grad
    assert make("mobilenet", "lite_residual", bias=False).model.s2a["lite_residual"][2].norm2.bias.requires_grad


def test_side_tuning_blends_features_and_begins_at_a_file(tmp_path):
    weights = {f"features.{name}": t for name, t in alexnet_features().state_dict().items()}
    torch.save(weights | {"classifier.6.bias": torch.zeros(1000)}, tmp_path / "alexnet.pth")
    made = make("vit", "side_tuning", checkpoint=str(tmp_path / "alexnet.pth"))
    network, head, images = made.model.s2a["side_tuning"], made.model.head, batch(made)[0]
    assert torch.equal(network.features[10].weight, weights["features.10.weight"])
    features = []
    head.register_forward_pre_hook(lambda head, args: features.append(args[0]), prepend=True)
    with torch.no_grad():
        found = made.model.eval()(images)
        large = network.features(F.interpolate(images, (63, 63), mode="bilinear"))
        side = network.projection(large.expand(-1, -1, 6, 6).flatten(1))
        torch.testing.assert_close(found, F.linear((features[0] + side) / 2, head.weight, head.bias))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "odd.pth")
    for name, text in (("none.pth", "no such file"), ("odd.pth", "is no AlexNet")):
        with pytest.raises(UserError, match=f"method.checkpoint=.*{name}: {text}"):
            make("vit", "side_tuning", checkpoint=str(tmp_path / name))


def test_a_bypass_goes_on_from_block_to_block():
    made, images = double("vit", "res_tuning_bypass", dim=3)
    bypass, plain = made.model.s2a["res_tuning_bypass"], make("vit").model.double().eval()
    with torch.no_grad():
        h = x = plain._pos_embed(plain.patch_embed(images))
        for block, lateral, vertical in zip(plain.blocks, bypass.lateral, bypass.vertical):
            h = block(h)
            x = h + lateral(h) + x + vertical(x)
        torch.testing.assert_close(made.model(images), plain.forward_head(plain.norm(x)))


def test_structures_beside_a_bypass_learn_through_it():
    made = make("vit")
    attached = methods.attach(compose(["method=[bias,res_tuning_bypass]"]).method, made)
    loss_of(attached.backbone).backward()
    assert all(p.grad is not None for p in attached.model.parameters() if p.requires_grad)
    alone = make("vit", "res_tuning_bypass")
    kept = saved_bytes(lambda: loss_of(alone), alone.model)
    assert kept < saved_bytes(lambda: loss_of(attached.backbone), attached.model)


def test_a_parallel_network_pools_maps_to_the_last():
    made, images = double("swin", "unipt", reduction=2)
    network = made.model.s2a["unipt"]
    seen = []
    network.down[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    with torch.no_grad():
        made.model(images)
    first, _ = calls(made.blocks[0].module, made.model, images)  # [B, 8, 8, C], and the last map is 4 x 4
    pooled = F.avg_pool2d(first.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(seen[0], F.relu(pooled))


def test_features_are_pooled_to_about_a_number():
    for backbone in ("vit", "resnet"):
        for block in make(backbone).blocks:
            pooled = PooledState(block.output, 200)
            assert pooled(torch.randn(2, *block.output.shape)).shape == (2, pooled.size)
            assert pooled.size <= 200 or pooled.size == block.output.channels


def test_a_conv_adapter_pads_as_its_convolution_does():
    model = timm.create_model("tf_mobilenetv3_small_100", num_classes=5)
    attached = s2a_cli.attach(model, "conv_adapter", inputs=(1, 3, 65, 65))
    images = torch.randn(2, 3, 65, 65)
    model.train()(images).sum().backward()
    adapters = model.s2a["conv_adapter"]
    assert all(adapter.down.weight.grad is not None for adapter in adapters)
    assert any(type(adapter.down) is not nn.Conv2d for adapter in adapters) and attached.blocks


def test_head2toe_selects_features_in_a_run(tmp_path):
    attached = make_attached("vit", "head2toe", select_after=3, fraction=0.25, lasso=0.1)
    model, selected = attached.model, attached.model.s2a["head2toe"]
    train_mode(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step = Step(compose(["method=head2toe", "quant=none"]), torch.device("cpu"), attached)
    weight, scores = selected.classifier.weight, None
    for number in range(5):
        step(model, optimizer, *batch(attached.backbone))
        if number == 1:
            assert selected.kept.all() and (weight != 0).any(0).all()
            scores = weight.detach().norm(dim=0)
        elif number == 2:
            assert not weight.any() and weight not in optimizer.state, "what was learned is forgotten"
    kept = selected.kept
    assert kept.sum() == int(0.25 * len(kept)) and torch.equal((weight != 0).any(0), kept) and selected.steps == 3
    assert scores[kept].mean() > scores[~kept].mean()
    state = checkpoints.trainable_state(model)
    other = make_attached("vit", "head2toe", select_after=3)
    checkpoints.restore(other.model, state)
    assert torch.equal(other.model.s2a["head2toe"].kept, kept) and other.model.s2a["head2toe"].steps == 3
    images = batch(attached.backbone)[0]
    with torch.no_grad():
        assert torch.equal(other.model.eval()(images), model.eval()(images))


def test_a_step_that_is_left_out_shrinks_nothing():
    attached = make_attached("vit", "head2toe", select_after=9)
    model, selected = attached.model, attached.model.s2a["head2toe"]
    train_mode(model)
    with torch.no_grad():
        selected.classifier.weight.fill_(1.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step = Step(compose(["method=head2toe", "quant=none", "precision=amp-fp16"]), torch.device("cpu"), attached)
    images, targets = batch(attached.backbone)
    step(model, optimizer, images * torch.inf, targets)  # its gradients are no numbers
    assert selected.steps == 0 and (selected.classifier.weight == 1).all()
    step(model, optimizer, images, targets)
    assert selected.steps == 1 and (selected.classifier.weight != 1).any()


def test_a_strong_lasso_leaves_no_feature():
    attached = make_attached("vit", "head2toe", select_after=9, lasso=1e3)
    optimizer = torch.optim.SGD([p for p in attached.model.parameters() if p.requires_grad], lr=0.1)
    loss_of(attached.backbone).backward()
    optimizer.step()
    weight = attached.model.s2a["head2toe"].classifier.weight
    norms = weight.detach().norm(dim=0)
    attached.after_step[0](optimizer)
    assert norms.max() > 0 and not weight.any()
    attached.model.s2a["head2toe"].lasso = 0.5
    with torch.no_grad():
        weight.fill_(1.0)
    attached.after_step[0](optimizer)
    torch.testing.assert_close(weight.norm(dim=0), torch.full_like(norms, CLASSES**0.5 - 0.05))


@pytest.mark.parametrize("names", ["side_tuning", "[linear,unipt]", "[side,head2toe]", "res_tuning_bypass"])
def test_what_reads_more_than_features_runs_the_backbone(names):
    attached = methods.attach(compose([f"method={names}"]).method, make("vit"))
    assert not attached.adapts and attached.feature_head is None


def test_codes_stand_for_what_a_res_adapter_keeps():
    made = make("vit", "res_tuning")
    train_mode(made.model)
    kept = [saved_bytes(lambda b=bits: loss_of(made, quant(b)), made.model) for bits in (None, 4)]
    assert kept[1] < 0.45 * kept[0]
