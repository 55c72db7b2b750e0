"""Tuners of the peft library: as peft itself wraps a model, at the layers that a word names, and what is refused."""

from __future__ import annotations

import ast
import copy
import sys
from pathlib import Path

import pytest
import torch
from layouts import batch, loss_of, make, make_attached, quant
from torch import nn

import s2a_cli
from s2a_cli import backbones, methods
from s2a_cli.activations import compress_activations
from s2a_cli.backbones import frozen_weights
from s2a_cli.backbones.stored import Stored
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.config.schema import BackboneConfig, QuantConfig
from s2a_cli.memory import saved_bytes
from s2a_cli.methods.parts.deep_supervision import losses_of
from s2a_cli.methods.parts.peft_library import BlockDiagonals
from s2a_cli.planner.run_memory import Composition, Predictor
from s2a_cli.training.step import make_optimizer, train_mode

peft = pytest.importorskip("peft", reason="peft is not installed")
QKV = r".*\.qkv"
BEIT = BackboneConfig(
    name="beit",
    timm="beit_base_patch16_224",
    pretrained=False,
    image_size=32,
    kwargs=dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2),
)


def wrapped(made) -> list[str]:
    """The names of the layers that peft has put its own in place of."""
    return [n for n, m in made.model.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]


def logits(made) -> torch.Tensor:
    with torch.no_grad():
        return made.model.eval()(batch(made.backbone)[0])


def train(made, steps: int = 2) -> torch.Tensor:
    """Returns the logits after some steps."""
    train_mode(made.model)
    optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=0.1)
    for number in range(steps):
        torch.manual_seed(number)
        loss_of(made.backbone).backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits(made)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=8, lora_alpha=8, target_modules=QKV),
        peft.LoraConfig(r=8, lora_alpha=8, use_dora=True, target_modules=QKV),
        peft.VeraConfig(r=8, target_modules=QKV),
        peft.FourierFTConfig(n_frequency=20, scaling=10.0, target_modules=QKV),
        peft.HRAConfig(r=8, target_modules=QKV),
        peft.IA3Config(target_modules=r".*\.(qkv|fc2)", feedforward_modules=r".*\.fc2"),
    ],
    ids=lambda config: type(config).__name__ + "-dora" * getattr(config, "use_dora", False),
)
def test_as_peft_wraps_the_same_model(config):
    """Names, function and gradients are those of `get_peft_model`, with the head beside."""
    method = "dora" if getattr(config, "use_dora", False) else config.peft_type.value.lower()
    made, theirs = make_attached("vit", method), make("vit")
    train(made, 1)  # so that the adapters do something
    model = peft.get_peft_model(theirs.model, config).base_model.model
    theirs.head.layers["head"].requires_grad_(True)
    model.load_state_dict(made.model.state_dict(), strict=True)
    for one in (made.model, model):
        one.zero_grad()
        losses_of(one.train()(batch(made.backbone)[0]), batch(made.backbone)[1]).sum().backward()
    grads = [{n: p.grad for n, p in one.named_parameters() if p.grad is not None} for one in (made.model, model)]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
    assert torch.equal(logits(made), model.eval()(batch(made.backbone)[0]))


@pytest.mark.parametrize(
    ("family", "target", "expected"),
    [
        ("vit", "qkv", ["attn.qkv"]),
        ("vit", "attention", ["attn.qkv", "attn.proj"]),
        ("vit", "mlp", ["mlp.fc1", "mlp.fc2"]),
        ("vit", "all", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]),
        ("vit", r".*\.proj", ["attn.proj"]),
        ("resnet", "all", ["conv1", "conv2"]),
    ],
)
def test_words_name_layers_of_the_adapted_blocks(family, target, expected):
    made = make_attached(family, "peft", target=target, blocks="last:1")
    last = made.backbone.blocks[-1].name
    assert wrapped(made) == [f"{last}.{name}" for name in expected]


def test_regular_expressions_reach_layers_beside_the_blocks():
    made = make_attached("vit", "peft", target=r"patch_embed\.proj|blocks\.0\.mlp\.fc1")
    assert wrapped(made) == ["patch_embed.proj", "blocks.0.mlp.fc1"]


@pytest.mark.parametrize(
    ("family", "method", "settings", "said"),
    [
        ("vit", "peft", {"tuner": "lra"}, r"method.tuner=lra: expected one of .*beft.*\(did you mean 'lora'\?\)"),
        ("vit", "peft", {"tuner": "adalora"}, "method.tuner=adalora: moves ranks"),
        ("vit", "peft", {"tuner": "lily"}, "method.tuner=lily: weighs its factors by all images of a batch"),
        ("vit", "peft", {"tuner": "p_tuning"}, "method.tuner=p_tuning: is made for language models"),
        (
            "vit",
            "lora",
            {"peft": {"rr": 8}},
            r"method.peft.rr: LoraConfig of peft has no such field \(did you mean 'r'",
        ),
        ("vit", "lora", {"peft": {"task_type": "a"}}, "method.peft.task_type: LoraConfig of peft has no such field"),
        ("vit", "lora", {"peft": {"r": "big"}}, "method.peft.r=big: expected an integer"),
        ("vit", "lora", {"peft": {"lora_dropout": float("nan")}}, "lora_dropout=nan: expected at most 1,000,000"),
        ("vit", "lora", {"peft": {"r": 0}}, "method=lora: peft's lora refuses blocks.0.attn.qkv: .*positive integer"),
        ("vit", "lora", {"peft": {"target_modules": "a"}}, "target_modules: can't be set: method.target"),
        ("vit", "lora", {"peft": {"megatron_core": "os"}}, "megatron_core: can't be set"),
        ("vit", "lora", {"peft": {"init_lora_weights": "eva"}}, "init_lora_weights=eva: needs images"),
        ("vit", "boft", {"peft": {"boft_block_num": 3}}, "method.peft={.*}: peft refuses it: .*boft_block_size"),
        (
            "vit",
            "lora",
            {"target": r".*\.qkw"},
            r"method.target=.*: matches the whole name of none of patch_embed.proj",
        ),
        ("vit", "lora", {"target": "head"}, "matches the whole name of none"),
        ("convnext", "lora", {"target": r".*conv_dw"}, r"peft's lora refuses stages.0.blocks.0.conv_dw: .*groups"),
        ("convnext", "oft", {"target": r".*conv_dw"}, "peft's oft cuts the input of stages.0.blocks.0.conv_dw"),
        ("resnet", "vera", {"target": "all"}, "peft's vera refuses layer1.0.conv1"),
    ],
)
def test_what_is_refused(family, method, settings, said):
    with pytest.raises(UserError, match=said) as raised:
        make_attached(family, method, **settings)
    assert "\n" not in str(raised.value)


def test_layers_whose_weights_alone_are_read_are_refused():
    """BEiT computes with qkv.weight itself: what is put around the layer would never run."""
    settings = methods.STRUCTURES["peft"].Settings
    with pytest.raises(UserError, match="reads the weights of blocks.0.attn.qkv, blocks.1.attn.qkv without running"):
        methods.STRUCTURES["peft"](settings(target=r".*attn\.qkv")).attach(backbones.build(BEIT, 7))
    made = methods.STRUCTURES["peft"](settings(target="attention")).attach(backbones.build(BEIT, 7))
    assert wrapped(made) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]


def test_layers_that_compute_in_a_way_of_their_own_are_refused():
    made = make("resnet")
    odd = type("StandardisedConv2d", (nn.Conv2d,), {"__module__": "timm.layers"})
    made.blocks[0].layers[0][1].__class__ = odd
    settings = methods.STRUCTURES["peft"].Settings(target="all")
    with pytest.raises(UserError, match="layer1.0.conv1 is a StandardisedConv2d, which computes in a way of its own"):
        methods.STRUCTURES["peft"](settings).attach(made)


def attach(*words: str):
    return methods.attach(compose(list(words)).method, make("vit"))


def test_beside_other_structures():
    """Biases of wrapped layers train, and other layers can have another tuner; the same layer can't."""
    made = attach("method=[lora,bias,side]", "method.side.width=4")
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert {"blocks.0.attn.qkv.base_layer.bias", "blocks.0.norm1.bias", "s2a.side.readers.0.query"} <= trained
    assert "blocks.0.attn.qkv.base_layer.weight" not in trained
    both, plain = (
        attach("method=[lora,oft,bias]", "method.oft.target=mlp", "method.oft.peft={oft_block_size: 4}"),
        make("vit"),
    )
    expected = train(both)
    plain.model.load_state_dict(both.merge().state_dict(), strict=True)
    torch.testing.assert_close(plain.model.eval()(batch(plain)[0]), expected, rtol=1e-4, atol=2e-6)
    with pytest.raises(UserError, match="method=oft: another structure has replaced blocks.0.attn.qkv"):
        attach("method=[lora,oft]", "method.oft.peft={oft_block_size: 4}")


def test_hooks_of_a_layer_act_around_what_the_tuner_computes():
    """HRA never runs the layer itself, only reads its weight."""
    calls, made = [], make("vit")
    layer = made.model.get_submodule("blocks.0.attn.qkv")
    handle = layer.register_forward_hook(lambda module, args, output: calls.append(output) or output + 1)
    attached = methods.attach(compose(["method=hra"]).method, made)
    hooked = logits(attached)
    assert len(calls) == 1
    plain = attached.merge()
    assert plain.get_submodule("blocks.0.attn.qkv") is layer
    torch.testing.assert_close(plain(batch(made)[0]), hooked)
    handle.remove()
    assert not layer._forward_hooks


@pytest.mark.parametrize("kind", ["int8", "nf4", "offload"])
@pytest.mark.parametrize("method", ["lora", "hra"])
def test_frozen_weights_of_wrapped_layers_are_stored(method, kind):
    """Also where the tuner reads the weight: QLoRA, and the like for others."""
    made, exact = make_attached("vit", method), make_attached("vit", method)
    total = made.backbone.count()
    frozen_weights.store(made.backbone, kind)
    inner = made.model.get_submodule("blocks.0.attn.qkv").get_base_layer()
    assert isinstance(inner, Stored) and made.backbone.count() == total
    assert not any(isinstance(m, Stored) for n, m in made.model.named_modules() if ".lora_" in n)
    torch.testing.assert_close(logits(made), logits(exact), rtol=0, atol={"int8": 0.02, "nf4": 0.3, "offload": 0}[kind])
    before = logits(made)
    trained = train(made)
    assert not torch.equal(trained, before)
    made.merge()  # into weights of the values that were computed with
    assert made.model.state_dict().keys() == make("vit").model.state_dict().keys()
    torch.testing.assert_close(logits(made), trained, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("tuner", ["peanut", "vblora", "beft", "shira"])
def test_tuners_without_a_name_of_their_own(tuner):
    fields = {"peanut": {"r": 4}, "vblora": {"vector_length": 8, "num_vectors": 8}, "shira": {"r": 2}}
    made = make_attached("vit", "peft", tuner=tuner, peft=fields.get(tuner, {}))
    twin = copy.deepcopy(made)
    before, after = logits(made), train(made)
    assert torch.equal(logits(twin), before) and torch.equal(train(twin), after) and not torch.equal(after, before)
    plain = make("vit")
    plain.model.load_state_dict(made.merge().state_dict(), strict=True)
    torch.testing.assert_close(plain.model.eval()(batch(plain)[0]), after, rtol=1e-4, atol=2e-6)


def test_butterfly_factors_need_no_compiler(monkeypatch):
    """peft compiles an extension for BOFT, and takes a single factor where that fails."""

    def compiles(*args, **kwargs):
        raise AssertionError("a compiler runs")

    monkeypatch.setattr("torch.utils.cpp_extension.load", compiles)
    made = make_attached("vit", "boft")
    assert made.model.get_submodule("blocks.0.attn.qkv").boft_R["default"].shape == (2, 12, 4, 4)
    blocks = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([torch.block_diag(*one) for one in blocks])
    (found,) = BlockDiagonals.forward(blocks.detach())
    assert torch.equal(found, expected)
    grad = torch.randn_like(expected)
    (expected,) = torch.autograd.grad(expected, blocks, grad)
    assert torch.equal(BlockDiagonals.backward(grad, blocks)[0], expected)


@pytest.mark.parametrize("tuner", ["hra", "shira"])
def test_odd_operators_are_recomputed(tuner):
    """HRA calls F.linear by keyword, SHiRA makes sparse tensors."""
    made, found = make_attached("vit", "peft", tuner=tuner, peft={"r": 2}), []
    train_mode(made.model)
    for settings in (QuantConfig(name="exact", recompute="block"), None):
        images, targets = batch(made.backbone)
        made.model.zero_grad()
        with compress_activations(settings, made.blocks) if settings else torch.enable_grad():
            loss = losses_of(made.model(images), targets).sum()
        loss.backward()
        found.append([p.grad for p in made.model.parameters() if p.grad is not None])
    for exact, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(exact, recomputed)


def test_lora_keeps_what_its_gradient_needs_and_no_more():
    """Beside the frozen model: the input of qkv that A reads, and A's output that B reads, a block."""
    made, wide = make_attached("vit", "lora"), make_attached("vit", "lora", peft={"r": 12})
    kept = [saved_bytes(lambda m=m: loss_of(m.backbone), train_mode(m.model) or m.model) for m in (made, wide)]
    tokens, blocks = 4 * made.backbone.blocks[0].input.positions, 3
    assert kept[1] - kept[0] == 4 * blocks * tokens * (12 - 8)
    coded = saved_bytes(lambda: loss_of(made.backbone, quant(4)), made.model)
    assert coded < kept[0]


def test_learning_rate_of_the_adapters():
    config = compose(["method=fourierft"])
    made = make_attached("vit", "fourierft")
    groups = make_optimizer(config.optim, made.model, made).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    names = {name: rates[id(p)] for name, p in made.model.named_parameters() if p.requires_grad}
    assert names["head.weight"] == config.optim.lr
    assert names["blocks.0.attn.qkv.fourierft_spectrum.default"] == pytest.approx(300 * config.optim.lr)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("tuner", ["shira", "waveft"])
def test_sparse_changes_and_masks_of_weights_are_predicted(tuner):
    words = ["backbone=vit_t", "method=peft", f"method.tuner={tuner}", "optim.batch_size=2", "quant=none"]
    assert Predictor()(Composition.of(compose(words))).memory.peak_mib > 22  # the weights


def test_what_runs_on_no_dataless_tensors_is_not_predicted(monkeypatch):
    words = ["backbone=vit_t", "method=peft", "method.tuner=shira", "optim.batch_size=2"]

    def refuses(*_):
        raise NotImplementedError("aten.odd.default of a sparse tensor\ncan't be run without data")

    monkeypatch.setattr("s2a_cli.training.forecast.profile_step", refuses)
    with pytest.raises(UserError, match="with method=peft can't be predicted: ") as raised:
        Predictor()(Composition.of(compose(words)))
    assert "\n" not in str(raised.value)


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError) as raised:
        methods.attach(compose(["method=lora"]).method, make("vit"))
    assert str(raised.value) == "method=lora needs peft: pip install 's2a[peft]'" and raised.value.code == 2


def test_peft_is_imported_when_it_is_needed():
    """It imports transformers, which takes seconds."""
    for path in Path(s2a_cli.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"peft", "transformers", "accelerate"}, path


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_fused_layers_of_pytorch_call_the_tuner_in_evaluation_too(method):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
            self.enc, self.out = nn.TransformerEncoder(layer, 2), nn.Linear(16, 5)

        def forward(self, x):
            return self.out(self.enc(x).mean(1))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 6, 16)
    attached, plain = s2a_cli.attach(model, method, inputs=x, target="all"), copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if not name.startswith("out."):
                parameter.copy_(torch.randn_like(parameter))
    trained = model.train()(x)
    assert not torch.allclose(trained, plain(x), atol=1e-2)
    for found in (model.eval()(x), attached.merge()(x), model.train()(x)):
        torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())
