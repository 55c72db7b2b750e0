"""attach: what trains, what the model returns in training, and the ways back to a plain model."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import timm
import torch
from models import NORMS, Net, inputs, net, targets, vit
from torch import nn
from torch.nn import functional as F

import s2a_cli
from s2a_cli.methods.parts.deep_supervision import mean_logits

MODELS = {"vit": vit, "net": net, "instance": functools.partial(net, NORMS["instance"])}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def attach(model: nn.Module, *method, **settings) -> s2a_cli.Attached:
    return s2a_cli.attach(model, *method, inputs=inputs(model) if isinstance(model, Net) else None, **settings)


def step(attached: s2a_cli.Attached, rate: float = 0.1) -> None:
    """One step of an ordinary loop."""
    optimizer = torch.optim.SGD(attached.parameter_groups(rate))
    model = attached.model.train()
    F.cross_entropy(model(*inputs(model)), targets()).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def state(model: nn.Module) -> dict:
    """All that a model is, beside the values of its tensors: modules, hooks, flags."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        "hooks": hooks,
    }


# The output in training.


@pytest.mark.parametrize("soft", [False, True])
def test_the_cross_entropy_of_mean_logits(soft):
    """Is the mean of the votes' less a disagreement that knows no targets; each vote gets its share of the gradient."""
    votes = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)
    wanted = torch.rand(6, 5, dtype=torch.float64).softmax(-1) if soft else torch.arange(6) % 5
    one_hot = wanted if soft else F.one_hot(wanted, 5).double()
    probabilities = votes.softmax(-1)
    disagreement = -probabilities.prod(0).pow(1 / 4).sum(-1).log()
    found = F.cross_entropy(mean_logits(votes), wanted, reduction="none")
    each = torch.stack([F.cross_entropy(one, wanted, reduction="none") for one in votes])
    torch.testing.assert_close(found, each.mean(0) - disagreement, rtol=1e-12, atol=0)
    assert (disagreement > 0).all()
    (gradient,) = torch.autograd.grad(found.sum(), votes)
    of_one = (votes.mean(0).softmax(-1) - one_hot) / 4
    torch.testing.assert_close(gradient, of_one.expand_as(gradient), rtol=1e-12, atol=1e-15)


def test_every_vote_learns_by_an_ordinary_loss():
    attached = attach(vit(), "side")
    model = attached.model.train()
    output = model(*inputs(model))
    assert output.shape == (4, 5)
    F.cross_entropy(output, targets()).backward()
    votes = [reader.classifier.bias.grad for reader in model.s2a["side"].readers]
    assert len(votes) == 3 and all(grad is not None and grad.abs().max() > 0 for grad in votes)


def test_votes_learn_as_if_each_were_alone():
    attached = attach(vit(), "side", votes=True)
    model = attached.model.train()
    output = model(*inputs(model))
    assert output.shape == (4, 4, 5)
    loss = attached.loss(output, targets())
    assert torch.equal(loss, torch.stack([F.cross_entropy(one, targets()) for one in output]).sum())
    smooth = attached.loss(output, targets(), nn.CrossEntropyLoss(label_smoothing=0.1))
    assert smooth != loss
    assert model.eval()(*inputs(model)).shape == (4, 5)
    assert torch.equal(attached.loss(output[0], targets()), F.cross_entropy(output[0], targets()))


# What trains, and what stays.


@each_model
@pytest.mark.parametrize("method", ["bias", "s2a", ["bias", "side"]], ids=str)
def test_only_what_trains_changes(make, method):
    attached = attach(make(), method)
    model = attached.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step(attached)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name, _ in attached.named_parameters()}
    assert changed and changed <= trained == attached.state_dict().keys()
    assert sum(p.numel() for p in attached.parameters()) == attached.count()["trainable"] + attached.count()["head"]


def test_parts_have_learning_rates_of_their_own():
    attached = attach(vit(), "s2a", prompt={"lr_scale": 0.5}, side={"lr_scale": 3.0})
    rates = {p: group["lr"] for group in attached.parameter_groups(0.1) for p in group["params"]}
    by_name = {name: rates[p] for name, p in attached.named_parameters()}
    assert by_name["s2a.prompt.0.A"] == pytest.approx(0.05)
    assert by_name["s2a.side.readers.0.query"] == pytest.approx(0.3)
    assert by_name["blocks.0.norm1.bias"] == pytest.approx(0.1)
    assert {group["lr"] for group in attached.parameter_groups()} == {0.004, 0.002, 0.012}


def test_blocks_are_found_or_given():
    model = net()
    assert attach(model, "bias").blocks == list(model.units)
    model = net()
    attached = attach(model, "bias", blocks=model.units[1:], adapt="last:1", head="out.2")
    assert attached.blocks == list(model.units[1:])
    assert {name for name, _ in attached.named_parameters()} == {
        *("units.2.norm.bias", "units.2.conv.bias", "out.0.bias", "out.2.weight", "out.2.bias")
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_added_has_the_dtype_of_the_model(dtype):
    """And works in an nn.Sequential, which calls all that it holds."""
    model = nn.Sequential(vit()).to(dtype).eval()
    x = inputs(model)[0].to(dtype)
    before = model(x)
    attached = s2a_cli.attach(model)
    torch.testing.assert_close(3 * model(x), before)  # the mean of the head's vote and of two that are zero still
    assert {p.dtype for p in model.parameters()} == {dtype}
    F.cross_entropy(model.train()(x), targets()).backward()
    assert all(p.grad is not None for p in attached.parameters())


# The ways back.


@each_model
@pytest.mark.parametrize("method", ["bias", "full", "s2a"])
def test_a_detached_model_is_as_it_was_found(make, method):
    model = make().train()
    model.get_submodule("blocks" if hasattr(model, "blocks") else "units")[0].requires_grad_(False)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    before, output = state(model), model.eval()(*inputs(model))
    model.train()
    attached = attach(model, method)
    step(attached)
    assert not torch.equal(model(*inputs(model)), output)
    assert attached.detach() is model
    for p in model.parameters():
        p.grad = None
    assert state(model) == before
    assert torch.equal(model.eval()(*inputs(model)), output)
    handle.remove()
    count = len(calls)
    model(*inputs(model))
    assert len(calls) == count  # the handle was still of this hook


@pytest.mark.parametrize("method", ["lora", "vpt_deep", "lst", "fact_tt"])
def test_structures_of_all_kinds_leave_no_trace(method):
    if method == "lora":
        pytest.importorskip("peft")
    model = vit()
    before, output = state(model), model(*inputs(model))
    attached = attach(model, method, **({"rank": 4} if method == "fact_tt" else {}))
    step(attached)
    attached.detach()
    assert state(model) == before and torch.equal(model(*inputs(model)), output)


def test_a_merged_model_is_plain_and_computes_the_same():
    model, plain = vit(), vit()
    attached = attach(model, "bias")
    step(attached)
    output = model(*inputs(model))
    assert attached.merge() is model
    assert state(model)["modules"] == state(plain)["modules"] and all(p.requires_grad for p in model.parameters())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(*inputs(model)), output) and torch.equal(model(*inputs(model)), output)


def test_what_can_not_be_merged_stays():
    attached = attach(vit(), "s2a")
    step(attached)
    output = attached.model(*inputs(attached.model))
    with pytest.raises(s2a_cli.UserError, match="no weight of the backbone can hold it"):
        attached.merge()
    assert torch.equal(attached.model(*inputs(attached.model)), output)


@pytest.mark.parametrize("method", ["bias", "ssf"])
def test_after_merge_it_is_over(method):
    attached = attach(vit(), method)
    step(attached)
    model, few = attached.model, attached.state_dict()
    output = model(*inputs(model))
    attached.merge()
    for call in (attached.merge, attached.detach, attached.state_dict, attached.parameter_groups):
        with pytest.raises(s2a_cli.UserError, match=r"nothing of this is attached .* since merge\(\)"):
            call()
    with pytest.raises(s2a_cli.UserError, match=r"since merge\(\)"):
        attached.load_state_dict(few)
    torch.testing.assert_close(model(*inputs(model)), output)
    attach(model, "bias").detach()


def test_a_detached_one_leaves_alone_what_is_attached_later():
    model = vit()
    first = attach(model, "bias")
    first.detach()
    second = attach(model, "side")
    step(second)
    before = state(model)
    with pytest.raises(s2a_cli.UserError, match=r"since detach\(\)"):
        first.detach()
    assert state(model) == before


# Few tensors, copies and files.


def test_the_few_tensors_carry_all_that_was_trained():
    first, second = attach(vit(), "s2a"), attach(vit(), "s2a")
    step(first)
    few = first.state_dict()
    assert 0 < len(few) < len(first.model.state_dict())
    second.load_state_dict(few)
    model = second.model
    assert torch.equal(model(*inputs(model)), first.model(*inputs(model)))
    other = attach(vit(), "bias")
    with pytest.raises(s2a_cli.UserError, match=r"has s2a\.prompt\.0\.A"):
        other.load_state_dict(few)
    with pytest.raises(s2a_cli.UserError, match=r"lacks s2a\.prompt\.0\.A"):
        second.load_state_dict(other.state_dict())
    with pytest.raises(s2a_cli.UserError, match=r"has blocks\.0\.attn\.proj\.weight, .* more, frozen here"):
        other.load_state_dict(attach(vit(), "full").state_dict())
    before = second.state_dict()
    with pytest.raises(s2a_cli.UserError, match=r"head\.bias: \[6\] in the state, \[5\] in the model"):
        second.load_state_dict({name: t + 1 for name, t in few.items()} | {"head.bias": torch.zeros(6)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in second.state_dict().items())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_of_their_own(how):
    attached = attach(vit(), "s2a")
    step(attached)
    if how == "deepcopy":
        twin = copy.deepcopy(attached)
    else:
        torch.save(attached, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    model, output = attached.model, attached.model(*inputs(attached.model))
    assert torch.equal(twin.model(*inputs(model)), output)
    step(twin)
    assert torch.equal(model(*inputs(model)), output) and not torch.equal(twin.model(*inputs(model)), output)
    twin.detach()
    assert torch.equal(twin.model(*inputs(model)), vit()(*inputs(model)))
    assert torch.equal(model(*inputs(model)), output)


# Refusals.


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"head": "blocks.0.mlp.fc1"}, r"fc1 does not return the 5 numbers that the model returns"),
        ({"head": "haed"}, r"head=haed: no linear layer .*did you mean 'head'"),
        ({"blocks": "last:2"}, "expected the modules themselves; adapt="),
        ({"blocks": [nn.Linear(1, 1)]}, "a Linear is none of VisionTransformer"),
        ({"inputs": (1, 3, 64, 64)}, r"can't take inputs \[B, 3, 64, 64\]"),
        ({"promt": 3}, r"method\.promt: no such setting.*did you mean 'method\.prompt'"),
        ({"adapt": "last:9"}, "accepted are all and last:1 to last:3"),
        ({"method": ["bias", "side"], "adapt": "last:1", "side": None}, r"side: expected settings .*, not None"),
        ({"method": ["bias", "side"], "adapt": "last:1", "side": "x"}, r"side: expected settings .*, not 'x'"),
        ({"method": "s2b"}, "method=s2b: expected one of"),
        ({"method": "head2toe"}, "acts between steps"),
        ({"method": "linear", "adapt": "all"}, "adapts no blocks"),
        ({"method": None}, "method: expected a name or several, not None"),
        ({"method": ["bias", 3]}, "method: expected a name or several, not 3"),
        ({"blocks": nn.Linear(1, 1)}, "blocks: expected modules in a list, such as model.blocks, not Linear"),
        ({"blocks": 3}, "blocks: expected modules in a list, such as model.blocks, not 3"),
        ({"head": nn.Linear(1, 1)}, "head: expected the name of the classifier, not Linear"),
        ({"inputs": 32}, "inputs: expected tensors .* not 32"),
        ({"inputs": {"x": torch.ones(1, 3, 16, 16)}}, "inputs: expected tensors .* not dict"),
        ({"inputs": "1,3"}, "inputs: expected tensors .* not '1,3'"),
        ({"inputs": (0, 3, 16, 16)}, r"inputs: expected tensors .* not \(0, 3, 16, 16\)"),
        ({"inputs": torch.ones(0, 3, 16, 16)}, r"inputs: expected tensors .* not Tensor"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_and_leaves_no_trace(settings, said):
    model = vit()
    before, output = state(model), model(*inputs(model))
    with pytest.raises(s2a_cli.UserError, match=said):
        s2a_cli.attach(model, **settings)
    assert state(model) == before and torch.equal(model(*inputs(model)), output)


def test_a_model_without_a_classifier_and_one_that_has_something_attached_are_refused():
    with pytest.raises(s2a_cli.UserError, match="0 does not return the 16 numbers"):
        s2a_cli.attach(
            nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "linear"
        )
    for compiled in (torch.compile(vit(), backend="eager"), vit()):
        compiled.compile(backend="eager")
        with pytest.raises(s2a_cli.UserError, match="attach to the model itself, and compile it then"):
            s2a_cli.attach(compiled)
    model = vit()
    attach(model, "bias")
    with pytest.raises(s2a_cli.UserError, match="has something attached"):
        attach(model, "bias")
    with pytest.raises(s2a_cli.UserError, match="has something attached"):
        s2a_cli.attach(nn.Sequential(model), "side")
    for other in (None, "vit"):
        with pytest.raises(s2a_cli.UserError, match=rf"model: expected a torch\.nn\.Module, not {other!r}"):
            s2a_cli.attach(other)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("state", [None, {"head.bias": [0.0] * 5}], ids=str)
def test_a_state_without_tensors_is_refused(state):
    attached = attach(vit(), "bias")
    with pytest.raises(s2a_cli.UserError, match=r"state: expected the tensors .* None|head\.bias: expected a tensor"):
        attached.load_state_dict(state and attached.state_dict() | state)


def test_several_outputs_in_training_are_refused_where_the_method_reads_them():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = vit()

        def forward(self, x):
            logits = self.vit(x)
            return (logits, logits) if self.training else logits

    x = torch.randn(2, 3, 16, 16)
    attached = s2a_cli.attach(Net(), "s2a", inputs=(1, 3, 16, 16))
    assert attached.model.eval()(x).shape == (2, 5)
    with pytest.raises(s2a_cli.UserError, match="Net returned a tuple, and what is attached to it reads logits"):
        attached.model.train()(x)
    attached.detach()
    assert len(s2a_cli.attach(attached.model, "bias", inputs=(1, 3, 16, 16)).model.train()(x)) == 2


def test_a_frozen_head_does_not_count():
    attached = attach(vit(), "bias")
    before = attached.count()
    attached.model.head.requires_grad_(False)
    assert attached.count() == before | {"head": 0} and before["head"] == 24 * 5 + 5
    alone = s2a_cli.attach(nn.Linear(10, 5), "linear", inputs=(1, 10))
    assert alone.count()["percent"] == 0 and "0 parameters and 55 of the head train" in repr(alone)


@pytest.mark.parametrize(
    "method", ["side", "prompt", "s2a", "s2a_paper", "convpass", "mona", "dtl_plus", "bias", "dtl", "lst"]
)
def test_images_of_another_size_are_refused_where_positions_matter(method):
    sizes = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **sizes)
    s2a_cli.attach(model, method)
    for size in (32, 48, 16):
        images = torch.randn(2, 3, size, size)
        if size == 32 or method in ("bias", "dtl", "lst"):
            model(images)
        else:
            with pytest.raises(s2a_cli.UserError, match="17 positions, of images of 32 x 32, and a block has"):
                model(images)


@pytest.mark.parametrize("method", ["side", "lite_residual", "conv_adapter", "bias"])
def test_maps_of_convolutions_may_be_of_any_size(method):
    model = timm.create_model("test_resnet", num_classes=5).eval()
    s2a_cli.attach(model, method)
    assert model(torch.randn(2, 3, 96, 64)).shape == (2, 5)
