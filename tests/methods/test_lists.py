"""A method of several structures, and what an Attachment tells a training loop."""

from __future__ import annotations

import copy
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
        def count(logits):
            heard[name] += 1
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
