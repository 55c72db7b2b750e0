"""What single structures promise beyond the common tester (test_every_structure.py)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from layouts import batch, each_backbone, loss_of, made_config, make, make_attached, quant
from omegaconf import OmegaConf

from s2a_cli import backbones
from s2a_cli.activations import compress_activations
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.config.schema import BackboneConfig, QuantConfig
from s2a_cli.memory import saved_bytes
from s2a_cli.methods import STRUCTURES
from s2a_cli.methods.parts.deep_supervision import losses_of
from s2a_cli.methods.prompt import LowRankPrompt
from s2a_cli.training import checkpoints, forecast
from s2a_cli.training.run import attach
from s2a_cli.training.step import Step, train_mode

TRAINS = {  # what a name must look like to be trained, the head apart
    "full": lambda name: not name.startswith("s2a."),
    "linear": lambda name: False,
    "bias": lambda name: name.endswith("bias"),
    "prompt": lambda name: name.startswith("s2a.prompt."),
    "side": lambda name: name.startswith("s2a.side."),
    "s2a": lambda name: name.startswith("s2a.") or name.endswith("bias"),
}


each_method = pytest.mark.parametrize("method", TRAINS)


@each_backbone
@each_method
def test_what_trains(backbone, method):
    made = make(backbone, method)
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    names = {name for name, _ in made.model.named_parameters()}
    assert trained == {name for name in names if made.head.holds(name) or TRAINS[method](name)}


def test_statistics_of_frozen_blocks_stay():
    made = make("resnet", "full", blocks="last:1")
    train_mode(made.model)
    before = {name: b.clone() for name, b in made.model.named_buffers()}
    loss_of(made)
    moved = {name for name, b in made.model.named_buffers() if not torch.equal(b, before[name])}
    assert moved and all(name.startswith(made.blocks[-1].name) for name in moved)
    assert moved <= checkpoints.trainable_state(made.model).keys()


@each_backbone
def test_without_quantisation_a_step_in_segments_is_that_of_stock_pytorch(backbone):
    """The run's own step against one written out, bit for bit."""
    ours, stock = make_attached(backbone, "s2a", segments=2), make(backbone, "s2a", segments=2)
    train_mode(ours.model), train_mode(stock.model)
    config = compose(["method=s2a", "quant=none"])
    optimizers = [torch.optim.SGD([p for p in m.model.parameters() if p.requires_grad], lr=0.1) for m in (ours, stock)]
    for _ in range(2):
        images, targets = batch(stock)
        loss = Step(config, torch.device("cpu"), ours)(ours.model, optimizers[0], images, targets)
        expected = losses_of(stock.model(images), targets)
        expected.sum().backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert torch.equal(loss, expected.mean())
    for (name, one), two in zip(ours.model.state_dict().items(), stock.model.state_dict().values()):
        assert torch.equal(one, two), name


@each_backbone
@pytest.mark.parametrize("method", ["bias", "s2a"])
def test_kept_bytes_fall_with_bits(backbone, method):
    """A gradient passes the backbone, whose weights are frozen."""
    kept = []
    for bits in (None, 8, 4, 2):
        made = make(backbone, method)
        train_mode(made.model)
        kept.append(saved_bytes(lambda made=made, bits=bits: loss_of(made, quant(bits)), made.model))
    assert kept[0] > 2 * kept[1]
    assert kept[1] > kept[2] > kept[3] or backbone == "resnet"  # all of its operators have exact codes


@each_backbone
@pytest.mark.parametrize("method", [m for m in TRAINS if m != "linear"])
def test_nothing_is_kept_below_the_first_adapted_block(backbone, method):
    made, whole = make(backbone, method, blocks="last:1"), make(backbone, method)
    train_mode(made.model), train_mode(whole.model)
    loss_of(made).backward()
    first = made.blocks[-1].name
    below = [p for name, p in made.model.named_parameters() if name.startswith(made.blocks[0].name + ".")]
    assert all(p.grad is None for p in below)
    touched = {n for n, p in made.model.named_parameters() if p.grad is not None}
    assert any(n.startswith((first, "s2a.")) for n in touched)
    kept = saved_bytes(lambda: loss_of(made), made.model)
    assert kept < 0.75 * saved_bytes(lambda: loss_of(whole), whole.model)


@each_backbone
def test_prompts_need_no_activation(backbone):
    """dA = G B^T, dB = A^T G with G the gradient at the block's input summed over the batch."""
    made = make(backbone, "prompt")
    prompt, block = made.model.s2a["prompt"][1], made.blocks[1]
    prompt.B.data.normal_(std=0.1)
    states = []
    block.module.register_forward_pre_hook(lambda _, inputs: (inputs[0].retain_grad(), states.append(inputs[0]))[0])
    made.model.eval()
    loss_of(made).backward()
    gradient = states[0].grad
    if block.input.layout == "channels_first":
        gradient = gradient.permute(0, 2, 3, 1)
    g = gradient.reshape(len(gradient), -1, block.input.channels).double().sum(0)
    torch.testing.assert_close(prompt.A.grad.double(), g @ prompt.B.double().T, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(prompt.B.grad.double(), prompt.A.double().T @ g, rtol=1e-4, atol=1e-7)


@each_backbone
@pytest.mark.parametrize(
    "settings, samples",
    [
        ({"chunks": 1}, {4}),
        ({"chunks": 2}, {2}),
        ({"recompute": "block", "chunks": 2, "input": 16}, {4}),
        ({"recompute": "block", "chunks": 8, "input": 16}, {1}),
        ({"recompute": "block", "chunks": 8}, {4}),
    ],
    ids=str,
)
def test_prompts_are_added_in_chunks_where_that_saves_memory(backbone, settings, samples, monkeypatch):
    made = make(backbone, "prompt")
    made.model.eval()
    for prompt in made.model.s2a["prompt"]:
        prompt.B.data.normal_(std=0.1)
    loss_of(made).backward()
    expected = {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}
    made.model.zero_grad()
    seen, forward = set(), LowRankPrompt.forward
    monkeypatch.setattr(LowRankPrompt, "forward", lambda self, x: (seen.add(len(x)), forward(self, x))[1])
    images, targets = batch(made)
    with compress_activations(QuantConfig(name="chunks", **settings), made.block_modules):
        loss = losses_of(made.model(images), targets).sum()
    loss.backward()
    assert seen - {1} == samples - {1} and (1 in seen or samples != {1})  # a probe of one sample, too
    rounding = 0.05 if settings.get("input") else 1e-5
    for name, p in made.model.named_parameters():
        if p.grad is not None:
            assert (p.grad - expected[name]).norm() <= rounding * expected[name].norm(), name


CHUNKED = [{"chunks": 2}, {"recompute": "block", "chunks": 8, "input": 16}]


def in_chunks(made, settings, memory=None) -> dict[str, torch.Tensor]:
    """The logits and the prompts' gradients of a step in batch chunks, or without; a memory of an earlier step."""
    made.model.zero_grad()
    images, targets = batch(made)
    with memory or compress_activations(QuantConfig(name="chunks", **settings), made.block_modules):
        logits = made.model(images)
    losses_of(logits, targets).sum().backward()
    gradients = {name: p.grad.clone() for name, p in made.model.named_parameters() if "prompt" in name}
    return {"logits": logits.detach()} | gradients


def check_equal(found, expected):
    for name, one in expected.items():
        assert one.any() and (found[name] - one).norm() <= 0.03 * one.norm(), name


def prompted(backbone: str, *methods: str):
    """A backbone with prompts that change what it computes, and other structures around them."""
    made = make(backbone)
    for method in methods:
        STRUCTURES[method](made_config(backbone, method)).attach(made)
    for prompt in made.model.s2a["prompt"]:
        prompt.B.data.normal_(std=0.3)
    made.model.eval()
    return made


@pytest.mark.parametrize("settings", CHUNKED, ids=str)
@pytest.mark.parametrize(
    "backbone, methods",
    [
        ("swin", ["prompt", "lite_residual"]),  # whose forward hooks read the inputs of blocks
        ("convnext", ["lite_residual", "prompt"]),
        ("vit", ["prompt", "vpt_deep"]),
        ("vit", ["prompt", "side"]),
    ],
)
def test_what_stands_beside_prompts_computes_the_same_in_chunks(backbone, methods, settings):
    made = prompted(backbone, *methods)
    check_equal(in_chunks(made, settings), in_chunks(made, {"chunks": 1}))


@pytest.mark.parametrize("settings", CHUNKED, ids=str)
def test_all_hooks_see_the_sum_with_a_prompt(settings):
    made, seen = prompted("vit", "prompt"), []
    block = made.blocks[0].module
    register = {
        "pre": lambda: block.register_forward_pre_hook(lambda block, args: seen.append(args[0].detach().clone())),
        "forward": lambda: block.register_forward_hook(lambda block, args, out: seen.append(args[0].detach().clone())),
        "global": lambda: torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, out: seen.append(args[0].detach().clone()) if module is block else None
        ),
        "backward": lambda: block.register_full_backward_hook(lambda block, into, out: seen.append(into[0].clone())),
    }
    for kind, hook in register.items():
        handle = hook()
        in_chunks(made, {"chunks": 1})
        in_chunks(made, settings)
        handle.remove()
        whole = [one for one in seen if len(one) == 4]  # a probe is of one sample, and recomputation of a chunk
        assert len(whole) == 2, kind
        torch.testing.assert_close(whole[1], whole[0], rtol=0.03, atol=1e-3)
        seen.clear()


def test_a_probe_is_of_the_parameters_that_are_there():
    made = prompted("vit", "prompt")
    settings, prompt, block = CHUNKED[1], made.model.s2a["prompt"][1], made.blocks[1].module
    memory = compress_activations(QuantConfig(name="chunks", **settings), made.block_modules)
    in_chunks(made, settings, memory)
    handle = block.register_forward_pre_hook(lambda block, args: None)  # the sum is made before the block
    in_chunks(made, settings, memory)
    handle.remove()
    check_equal(in_chunks(made, settings, memory), in_chunks(made, {"chunks": 1}))
    prompt.B = torch.nn.Parameter(prompt.B.detach().flip(0) * 2)
    check_equal(in_chunks(made, settings, memory), in_chunks(made, {"chunks": 1}))
    for hook in list(block._forward_pre_hooks):
        del block._forward_pre_hooks[hook]
    other = made.model.s2a["prompt"][1] = copy.deepcopy(prompt)
    other.B.data.mul_(-1)
    block.register_forward_pre_hook(other.on_block_input, with_kwargs=True)
    check_equal(in_chunks(made, settings, memory), in_chunks(made, {"chunks": 1}))


def test_a_prompt_may_be_there_twice():
    made = prompted("vit", "prompt")
    prompt = made.model.s2a["prompt"][1]
    made.blocks[1].module.register_forward_pre_hook(prompt.on_block_input, with_kwargs=True)
    check_equal(in_chunks(made, CHUNKED[0]), in_chunks(made, {"chunks": 1}))


def test_a_call_that_was_broken_off_leaves_no_prompt_for_the_next():
    made = prompted("vit", "prompt")
    (images, _), block, prompt = batch(made), made.blocks[1].module, made.model.s2a["prompt"][1]
    state, plain = (
        torch.randn(4, 17, 48),
        compress_activations(QuantConfig(name="chunks", chunks=2), made.block_modules),
    )
    expected = made.model(images)
    with plain:
        assert prompt.on_block_input(block, (state,), {}) is None  # where the call ends behind the hook
        torch.testing.assert_close(made.model(images), expected)
        assert prompt.on_block_input(block, (state,), {}) is None
        block._forward_pre_hooks.clear()
        found = block(state.clone())
    torch.testing.assert_close(found, block(state))


def test_a_model_that_kept_the_forward_of_a_step_is_pickled():
    made = prompted("vit", "prompt")
    block = made.blocks[1].module
    with compress_activations(QuantConfig(name="chunks", chunks=2), made.block_modules):
        kept = block.forward
    block.forward = kept
    images = batch(made)[0]
    assert torch.equal(pickle.loads(pickle.dumps(made.model))(images), made.model(images))


def test_a_prompt_takes_less_than_a_hidden_state():
    peaks = []
    for method in ("[bias,prompt,side]", "[bias,side]"):
        words = ["backbone=vit_t", "backbone.image_size=112", "optim.batch_size=64", "quant=tiny", "quant.chunks=8"]
        config = compose([*words, f"method={method}"])
        attached = attach(config, backbones.build(config.backbone, 10, meta=True))
        peaks.append(forecast.predict_step(attached, config, 1000).peak_mib)
    state = 64 * 50 * 192 * 4 / 2**20
    assert 0 < peaks[0] - peaks[1] < 0.7 * state


def test_vit_b_trains_at_most_0_9_percent():
    config = BackboneConfig(name="vit_b", timm="vit_base_patch16_224.orig_in21k", pretrained=False)
    made = backbones.build(config, 100, meta=True)
    STRUCTURES["s2a"](OmegaConf.structured(STRUCTURES["s2a"].Settings())).attach(made)
    assert made.count()["percent"] <= 0.9


@pytest.mark.parametrize(
    "method, settings, message",
    [
        ("prompt", dict(rank=49), "at most"),
        ("s2a", dict(prompt=dict(rank=1000)), "rank=1000"),
        ("side", dict(blocks="last:4"), "last:3"),
        ("bias", dict(blocks="last:4"), "last:3"),
        ("bias", dict(blocks="first:1"), "accepted are all"),
        ("s2a", dict(bias=False, prompt=None, side=None), "method=linear"),
        ("s2a", dict(segments=4), "1 to 3"),
        ("s2a", dict(segments=2, blocks="last:1"), "1 to 1"),
        ("s2a", dict(segments=2, side=None), "needs the side branch"),
        ("s2a", dict(segments=2, bias=False, prompt=None), "both are switched off"),
        ("s2a", dict(segments=2, side=dict(blocks="last:1")), "side.blocks=last:1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(method, settings, message):
    with pytest.raises(UserError, match=message):
        make("vit", method, **settings)


def test_parts_of_s2a_can_be_switched_off():
    made = make("vit", "s2a", bias=False, side=None)
    trainable = {n for n, p in made.model.named_parameters() if p.requires_grad}
    assert all(n.startswith(("s2a.prompt", "head.")) for n in trainable)
