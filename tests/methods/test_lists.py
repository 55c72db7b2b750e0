"""A method of several structures, and what an Attachment tells a training loop."""

from __future__ import annotations

import copy
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from layouts import batch, defaults, each_backbone, make, make_attached
from omegaconf import OmegaConf

from s2a_cli import methods
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.config.overrides import CONF
from s2a_cli.methods import Attachment
from s2a_cli.methods.parts.deep_supervision import losses_of
from s2a_cli.training.step import Step, make_optimizer, train_mode


def attach(backbone: str, *words: str) -> tuple[Attachment, list[str]]:
    """The structures that the words name, attached to a tiny backbone of that layout; and all words."""
    made, small = make(backbone), []
    name = compose(list(words)).method.name
    for structure in name.split("+"):
        for key, value in defaults(backbone, structure).items():
            prefix = f"method.{structure}" if "+" in name else "method"
            if isinstance(value, dict):
                small += [f"{prefix}.{key}.{inner}={number}" for inner, number in value.items()]
            else:
                small.append(f"{prefix}.{key}={value}")
    torch.manual_seed(0)
    return methods.attach(compose([*small, *words]).method, made), [*small, *words]


def gradients(attached: Attachment, words: list[str]) -> dict[str, torch.Tensor]:
    """Of a step of the run's own, by name."""
    train_mode(attached.model)
    optimizer = torch.optim.SGD([p for p in attached.model.parameters() if p.requires_grad], lr=0.0)
    optimizer.zero_grad = lambda set_to_none: None
    Step(compose([*words, "quant=none"]), torch.device("cpu"), attached)(
        attached.model, optimizer, *batch(attached.backbone)
    )
    return {name: p.grad for name, p in attached.model.named_parameters() if p.grad is not None}


def test_a_list_has_settings_under_the_name_of_each_structure():
    config = compose(["method=[side,bias]", "method.side.heads=2", "method.bias.blocks=last:2"])
    assert OmegaConf.to_container(config.method) == {
        "name": "bias+side",
        "lr": 4e-3,  # the lowest of theirs
        "bias": {"blocks": "last:2"},
        "side": {"blocks": "all", "heads": 2, "width": 12, "grid": 7, "lr_scale": 2.5},
    }
    assert compose(["method=[side,bias]", "method.lr=8e-3"]).method.lr == 8e-3  # also where it is that of the last
    assert compose(["method=[side]"]).method == compose(["method=side"]).method
    assert compose(["method=[bias,side]"]).quant.name == "int4" and compose(["method=[full,side]"]).quant.name == "none"
    assert compose(["method=[bias,side]"]).optim.lr == compose(["method=s2a"]).optim.lr


def test_an_experiment_may_choose_a_list(tmp_path):
    conf = Path(shutil.copytree(CONF, tmp_path / "conf"))
    chosen = "# @package _global_\ndefaults:\n  - override /method: [side, bias]\n"
    (conf / "experiment" / "both.yaml").write_text(chosen + "method:\n  side:\n    heads: 2\n")
    assert compose(["experiment=both"], conf).method == compose(["method=[bias,side]", "method.side.heads=2"]).method
    assert compose(["experiment=both", "method.lr=1e-3"], conf).method.lr == 1e-3
    with pytest.raises(UserError, match=r"method.side.heads: no such setting"):  # what it says of side is not for bias
        compose(["experiment=both", "method=bias"], conf)


@each_backbone
def test_s2a_is_the_list_of_its_structures(backbone):
    """Bias and side, named one by one and as S2A without prompts: the same tensors, and gradients bit for bit."""
    several, several_words = attach(backbone, "method=[bias,side]")
    whole, whole_words = attach(backbone, "method=s2a", "method.prompt=false")
    for one, two in zip(several.model.state_dict().items(), whole.model.state_dict().items(), strict=True):
        assert one[0] == two[0] and torch.equal(one[1], two[1])
    found, wanted = gradients(several, several_words), gradients(whole, whole_words)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert several.adapts and several.feature_head is None and len(several.auxiliary) == 1


@each_backbone
def test_any_structure_joins_the_side_branch(backbone):
    """What the others train gets the gradient that it gets without the branch."""
    joined, words = attach(backbone, "method=[full,side]")
    alone, alone_words = attach(backbone, "method=full")
    found, wanted = gradients(joined, words), gradients(alone, alone_words)
    assert found.keys() > wanted.keys() and any(name.startswith("s2a.side.") for name in found)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_structures_that_leave_the_backbone_alone_keep_its_features():
    attached, _ = attach("vit", "method=[linear,side]")
    assert not attached.adapts and attached.feature_head is not None and attached.feature_head.branch is not None
    assert methods.keeps_codable("linear+side") and not methods.keeps_codable("linear")


def test_two_structures_that_add_the_same_are_refused():
    with pytest.raises(UserError, match="two of its structures add side"):
        attach("vit", "method=[s2a,side]")


def test_what_no_weight_can_hold_is_not_merged():
    attached, _ = attach("vit", "method=[bias,full]")
    assert attached.merge() is attached.model
    for words, reason in (("method=prompt", "a low-rank prompt adds"), ("method=[bias,side]", "a side branch stands")):
        with pytest.raises(UserError, match=reason):
            attach("vit", words)[0].merge()


def test_learning_rates_are_those_of_the_attachment():
    attached = make_attached("vit", "side", lr_scale=3.0)
    head = attached.backbone.head
    attached = attached.with_learning_rates(head.layers.values(), 0.5)
    optim = compose(["method=side", "optim.lr=1e-2"]).optim
    rates = {
        id(p): group["lr"]
        for group in make_optimizer(optim, attached.model, attached).param_groups
        for p in group["params"]
    }
    assert {rates[id(p)] for p in head.parameters()} == {0.5e-2}
    assert {rates[id(p)] for p in attached.model.s2a["side"].parameters()} == {3e-2}
    assert not any(hasattr(module, "lr_scale") for module in attached.model.modules())


@each_backbone
def test_a_copy_of_an_attachment_learns_by_itself(backbone):
    attached = make_attached(backbone, "s2a")
    train_mode(attached.model)
    twin, (images, targets) = copy.deepcopy(attached), batch(attached.backbone)
    heard = {"original": 0, "copy": 0}

    def learn(name: str):
        def count(heads, logits):
            heard[name] += len(logits)
            losses_of(logits, targets).sum().backward()

        return count

    with attached.learning(learn("original")):
        twin.model(images)
        assert heard == {"original": 0, "copy": 0}
        with twin.learning(learn("copy")):
            twin.model(images)
    assert heard["original"] == 0 and heard["copy"] == len(attached.blocks)
    assert all(p.grad is None for p in attached.model.parameters())
    assert {id(m) for m, _ in twin.learning_rates}.isdisjoint(id(m) for m in attached.model.modules())
    assert {id(m) for m, _ in twin.learning_rates} <= {id(m) for m in twin.model.modules()}


MERGED = ("fact_tt", "fact_tk", "ssf", "repadapter", "lora", "dora", "residual_adapter", "bias")


@pytest.mark.parametrize(
    "names, backbone",
    [
        *(
            (f"{one},{two}", "vit")
            for one, two in itertools.combinations(MERGED, 2)
            if "residual_adapter" not in (one, two)
        ),
        *((names, "resnet") for names in ("residual_adapter,ssf", "bias,residual_adapter")),
    ],
)
def test_what_two_structures_make_of_a_layer_is_merged_as_it_is_computed(names, backbone):
    try:
        attached, _ = attach(backbone, f"method=[{names}]")
    except UserError as error:  # such as FacT's two forms together
        pytest.skip(str(error))
    images, generator = batch(attached.backbone)[0], torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in attached.model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
        expected = attached.model.eval()(images)
        if attached.unmergeable:
            pytest.skip(attached.unmergeable)
        torch.testing.assert_close(attached.merge().eval()(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", ["lst", "qst", "res_tuning_bypass", "unipt"])
@pytest.mark.parametrize("prompts", ["vpt_shallow", "vpt_deep"])
def test_side_networks_see_no_prompts(network, prompts):
    attached, words = attach("vit", f"method=[{network},{prompts}]")
    found = gradients(attached, words)
    assert any(prompts in name for name in found) and any(network in name for name in found)


def test_head2toe_adds_to_the_models_logits_alone():
    attached, _ = attach("vit", "method=[head2toe,s2a]")
    added = attached.model.s2a
    with torch.no_grad():
        added["head2toe"].classifier.weight.fill_(0.1)
        for p in added["side"].parameters():
            p.zero_()
    train_mode(attached.model)
    logits = attached.model(batch(attached.backbone)[0])
    assert logits.ndim == 3 and logits[0].any() and not logits[1:].any()


@pytest.mark.parametrize(
    "names, said",
    [
        ("convpass,vpt_deep", "method=vpt_deep: beside convpass or mona"),
        ("mona,vpt_shallow", "method=vpt_shallow: beside convpass or mona"),
        ("vpt_shallow,vpt_deep", "not beside another VPT"),
        ("vpt_deep,vpt_shallow", "not beside another VPT"),
        ("lst,s2a_paper", "the head can read one side network only"),
    ],
)
def test_structures_that_would_read_what_is_not_meant_for_them_are_refused(names, said):
    with pytest.raises(UserError, match=said):
        attach("vit", f"method=[{names}]")
