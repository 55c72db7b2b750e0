"""Every method on every layout of hidden states, through one common tester."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn import functional as F

from s2a_cli import backbones, checkpoints
from s2a_cli.activations import STOCK, remember
from s2a_cli.compose import compose
from s2a_cli.config import BackboneConfig, QuantConfig
from s2a_cli.errors import UserError
from s2a_cli.memory import saved_bytes
from s2a_cli.methods import METHODS, side
from s2a_cli.methods.side import STEP, Attend
from s2a_cli.steps import Step, train_mode
from s2a_cli.votes import vote_losses

BACKBONES = {
    "vit": dict(timm="vit_tiny_patch16_224", image_size=32, kwargs=dict(img_size=32, patch_size=8, embed_dim=48, depth=3)),
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
    torch.manual_seed(0)
    made = backbones.build(BackboneConfig(name=backbone, pretrained=False, **BACKBONES[backbone]), CLASSES)
    randomise(made.model)
    if method:
        METHODS[method](made_config(backbone, method, **settings)).attach(made)
    return made


def made_config(backbone: str, method: str, **settings):
    config = OmegaConf.structured(METHODS[method].Config(name=method, lr=1e-2))
    return OmegaConf.merge(config, defaults(backbone, method), settings)


def defaults(backbone: str, method: str) -> dict:
    """Small enough for these tiny widths and maps."""
    side, prompt = {"width": 4}, {"rank": 1}
    return {"side": side, "prompt": prompt, "s2a": {"side": side, "prompt": prompt}}.get(method, {})


def randomise(model):
    """Weights and statistics as of a trained model: no zero gammas, no unit variances."""
    for name, p in model.named_parameters():
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


def loss_of(backbone, quant=STOCK):
    images, targets = batch(backbone)
    with remember(quant):
        return vote_losses(backbone.model(images), targets).sum()


def quant(bits):
    return QuantConfig(name=f"int{bits}", lossless=bits is not None, bits=bits, pointwise=bits, norm=bits, attention=bits, softmax=bits)


each_backbone = pytest.mark.parametrize("backbone", BACKBONES)
each_method = pytest.mark.parametrize("method", METHODS)


@each_backbone
@each_method
def test_the_function_at_the_start_is_the_pretrained_one(backbone, method):
    plain, tuned = make(backbone), make(backbone, method)
    images, _ = batch(plain)
    with torch.no_grad():
        torch.testing.assert_close(tuned.model.eval()(images), plain.model.eval()(images), rtol=0, atol=0)


TRAINS = {  # what a name must look like to be trained, the head apart
    "full": lambda name: not name.startswith("s2a."),
    "linear": lambda name: False,
    "bias": lambda name: name.endswith("bias"),
    "prompt": lambda name: name.startswith("s2a.prompt."),
    "side": lambda name: name.startswith("s2a.side."),
    "s2a": lambda name: name.startswith("s2a.") or name.endswith("bias"),
}


@each_backbone
@each_method
def test_only_what_should_train_changes(backbone, method):
    made = make(backbone, method)
    train_mode(made.model)
    head = made.head_name + "."
    expected = {n for n, _ in made.model.named_parameters() if n.startswith(head) or TRAINS[method](n)}
    assert {n for n, p in made.model.named_parameters() if p.requires_grad} == expected
    before = {name: t.clone() for name, t in made.model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):  # what starts behind a zero-initialised factor moves from the second step on
        optimizer.zero_grad()
        loss_of(made, quant(4)).backward()
        optimizer.step()
    buffers = before.keys() - dict(made.model.named_parameters()).keys()
    changed = {name for name, t in made.model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed - buffers <= expected
    biases = {name for name in expected if name.endswith("bias")}
    single = {f"s2a.side.readers.{i}.query" for i, block in enumerate(made.blocks) if block.output.positions == 1}  # nothing to weigh
    assert expected - biases - single <= changed
    # a key's bias moves no softmax, and a bias before a normalisation by batch statistics is taken off again
    assert len(biases & changed) > 0.5 * len(biases)
    moves = {name for name in buffers if "running" in name} if method == "full" else set()
    assert changed & {name for name in buffers if "running" in name} == moves


def test_statistics_of_frozen_blocks_stay():
    made = make("resnet", "full", blocks="last:1")
    train_mode(made.model)
    before = {name: b.clone() for name, b in made.model.named_buffers()}
    loss_of(made)
    moved = {name for name, b in made.model.named_buffers() if not torch.equal(b, before[name])}
    assert moved and all(name.startswith(made.blocks[-1].name) for name in moved)
    assert moved <= checkpoints.trainable_state(made.model).keys()


@each_backbone
@each_method
def test_saved_tensors_restore_the_function(backbone, method, tmp_path):
    made = make(backbone, method)
    train_mode(made.model)
    loss_of(made)  # moves the statistics that move
    for p in made.model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    weights = "0123456789ab"
    checkpoints.save(tmp_path, checkpoints.trainable_state(made.model), {"0.1": torch.ones(3)}, weights)
    other = make(backbone, method)
    checkpoints.load(tmp_path, other.model, weights)
    images, _ = batch(made)
    with torch.no_grad():
        assert torch.equal(made.model.eval()(images), other.model.eval()(images))
    size = (tmp_path / checkpoints.FILE).stat().st_size
    count = made.count()
    assert method == "full" or size < 4 * (count["trainable"] + count["head"]) + 20_000  # the backbone is not in it


@each_backbone
@pytest.mark.parametrize(("method", "settings"), [*((method, {}) for method in METHODS), ("s2a", {"segments": 2})])
def test_without_quantisation_a_step_is_that_of_stock_pytorch(backbone, method, settings):
    """The run's own step against one written out, bit for bit."""
    ours, stock = make(backbone, method, **settings), make(backbone, method, **settings)
    train_mode(ours.model), train_mode(stock.model)
    config = compose([f"method={method}", "quant=none"])
    optimizers = [torch.optim.SGD([p for p in m.model.parameters() if p.requires_grad], lr=0.1) for m in (ours, stock)]
    for _ in range(2):
        images, targets = batch(stock)
        loss = Step(config, torch.device("cpu"))(ours.model, optimizers[0], images, targets)
        expected = vote_losses(stock.model(images), targets)
        expected.sum().backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert torch.equal(loss, expected.mean())
    for (name, one), two in zip(ours.model.state_dict().items(), stock.model.state_dict().values()):
        assert torch.equal(one, two), name


@each_backbone
@pytest.mark.parametrize("settings", [{}, {"segments": 2}])
def test_a_step_learns_from_each_vote_before_the_next_block(backbone, settings):
    made = make(backbone, "s2a", **settings)
    train_mode(made.model)
    readers, seen = made.model.s2a["side"].readers, []
    for block in made.blocks[1:]:
        block.module.register_forward_pre_hook(lambda *_: seen.append([reader.vote.bias.grad is not None for reader in readers]))
    optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=0.1)
    Step(compose(["method=s2a", "quant=none"]), torch.device("cpu"))(made.model, optimizer, *batch(made))
    count = len(made.blocks)
    assert seen == [[tap < done for tap in range(count)] for done in range(1, count)]


@each_backbone
@each_method
def test_kept_bytes_fall_with_bits(backbone, method):
    kept = []
    for bits in (None, 8, 4, 2):
        made = make(backbone, method)
        train_mode(made.model)
        kept.append(saved_bytes(lambda: loss_of(made, quant(bits)), made.model))
    assert kept == sorted(kept, reverse=True)
    if method in ("bias", "prompt", "s2a"):  # a gradient passes the backbone, whose weights are frozen
        assert kept[0] > 2 * kept[1]
        assert kept[1] > kept[2] > kept[3] or backbone == "resnet"  # all of its operators have exact codes


@each_backbone
@pytest.mark.parametrize("method", [m for m in METHODS if m != "linear"])
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
def test_a_side_branch_sends_no_gradient_through_the_backbone(backbone):
    made = make(backbone, "side")
    seen = []
    made.blocks[0].module.register_forward_hook(lambda _, __, h: seen.append(h.requires_grad))
    loss_of(made).backward()
    assert seen == [False]


@each_backbone
def test_a_tap_in_pieces_is_the_tap_of_the_whole_batch(backbone, monkeypatch):
    made = make(backbone, "side")
    images, _ = batch(made)
    tap, outputs = made.model.s2a["side"].taps[0], []
    made.blocks[0].module.register_forward_hook(lambda _, __, h: outputs.append(h.detach()))
    with torch.no_grad():
        made.model(images)
    whole = tap(outputs[0])
    monkeypatch.setattr(side, "PIECE", outputs[0][:3].numel())
    assert torch.equal(tap(outputs[0]), whole) and whole.dtype == torch.int8 and len(whole) == 4


def test_a_side_branch_reads_as_its_formula_says():
    """The gradient of the queries against autograd's in float64; kept are the codes once, and the weights."""
    tokens, query = torch.randint(-127, 128, (3, 10, 16), dtype=torch.int8), torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        read = Attend.apply(tokens, query)
    t = tokens.double() * STEP
    exact = torch.softmax(torch.einsum("bnc,hc->bhn", t, query), -1) @ t
    torch.testing.assert_close(read, exact)
    upstream = torch.randn_like(read)
    torch.testing.assert_close(
        *(torch.autograd.grad(output, query, upstream)[0] for output in (read, exact)), rtol=1e-10, atol=1e-12
    )
    assert {(t.dtype, t.numel()) for t in kept} == {(torch.int8, 3 * 10 * 16), (torch.float64, 3 * 10 * 4)} and len(kept) == 2


@each_backbone
@pytest.mark.parametrize("method", ["linear", "side"])
def test_a_tail_alone_computes_and_trains_what_the_model_does(backbone, method):
    made, whole = make(backbone, method), make(backbone, method)
    for one in (made, whole):
        torch.manual_seed(2)
        for p in one.model.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn_like(p)
    train_mode(made.model), train_mode(whole.model)
    images, targets = batch(made)
    tail = METHODS[method](made_config(backbone, method)).tail(made)
    taps, logits = tail.capture(lambda: made.model(images))
    assert {t.dtype for t in taps.tensors[1:]} <= {torch.int8} and len(taps.tensors) == 1 + (method == "side") * len(made.blocks)
    assert not any(t.requires_grad for t in taps.tensors)
    assert torch.equal(tail(taps), logits) and torch.equal(tail(taps), whole.model(images))
    vote_losses(tail(taps), targets).sum().backward()
    vote_losses(whole.model(images), targets).sum().backward()
    for (name, one), two in zip(made.model.named_parameters(), whole.model.parameters()):
        assert (one.grad is None) == (two.grad is None) and (one.grad is None or torch.equal(one.grad, two.grad)), name
    assert sum(p.numel() for p in tail.parameters()) == sum(p.numel() for p in made.model.parameters() if p.requires_grad)


@each_backbone
def test_the_votes_of_head_and_branch_leave_each_other_alone(backbone):
    """With the side branch, biases and head get the gradients that they get without; and the branch those of its own vote."""
    alone, both = make(backbone, "bias"), make(backbone, "s2a", prompt=None)
    branch = both.model.s2a["side"]
    torch.manual_seed(3)
    for reader in branch.readers:
        reader.vote.weight.data.normal_()
    for made in (alone, both):
        train_mode(made.model)
        loss_of(made).backward()
    found = dict(both.model.named_parameters())
    for name, p in alone.model.named_parameters():
        assert (p.grad is None) == (found[name].grad is None) and (p.grad is None or torch.equal(p.grad, found[name].grad)), name
    images, targets = batch(both)
    head, *votes = both.model(images)
    for reader, vote in zip(branch.readers, votes, strict=True):
        wanted = torch.autograd.grad(F.cross_entropy(vote, targets), reader.vote.weight)[0]
        torch.testing.assert_close(reader.vote.weight.grad, wanted)
    with torch.no_grad():
        torch.testing.assert_close(both.model.eval()(images), head + sum(votes) * 2 / len(votes))


@each_backbone
def test_no_gradient_leaves_a_segment(backbone):
    """What stands before the border learns by the vote there alone, what follows by the head's alone."""
    made, alone = make(backbone, "s2a", prompt=None, segments=2), make(backbone, "bias")
    border = len(made.blocks) // 2 - 1
    branch, block = made.model.s2a["side"], alone.blocks[border]
    assert branch.borders == {border}
    torch.manual_seed(3)
    for reader in branch.readers:
        reader.vote.weight.data.normal_()
    states = []
    block.module.register_forward_hook(lambda _, __, h: states.append(h) or h.detach())
    for one in (made, alone):
        train_mode(one.model)
        loss_of(one).backward()
    reader, tokens = branch.readers[border], branch.taps[border].tokens(states[0])
    weights = torch.softmax(torch.einsum("bnc,hc->bhn", tokens, reader.query), -1)
    read = torch.einsum("bhn,bnc,hcw->bhw", weights, tokens, reader.value)
    F.cross_entropy(reader.vote(reader.norm(read.flatten(1))), batch(made)[1]).backward()
    found, first = dict(made.model.named_parameters()), {name for name, _ in alone.adapted_modules("all")}
    first -= {name for name, _ in alone.adapted_modules(f"last:{len(made.blocks) - border - 1}")}
    touched = 0
    for name, p in alone.model.named_parameters():
        wanted, got = p.grad, found[name].grad
        assert (wanted is None) == (got is None), name
        if wanted is not None and name.rpartition(".")[0] in first:
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)
            touched += bool(got.any())
        elif wanted is not None:
            assert torch.equal(got, wanted), name
    assert touched > 3


@each_backbone
def test_learning_at_once_is_learning_afterwards(backbone):
    """Blocks that are computed again within the forward pass, where votes are learned from, make the codes that they make after it."""
    codes = QuantConfig(name="codes", recompute="block", input=8, pointwise=4, norm=4, attention=4)
    at_once, after = (make(backbone, "s2a", segments=2) for _ in range(2))
    gradients = []
    for made in (at_once, after):
        torch.manual_seed(3)
        for reader in made.model.s2a["side"].readers:
            reader.vote.weight.data.normal_()
        train_mode(made.model)
        optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=0.0)
        optimizer.zero_grad = lambda set_to_none: None
        step = Step(OmegaConf.merge(compose(["method=s2a"]), {"quant": OmegaConf.structured(codes)}), torch.device("cpu"), made.block_modules)
        for _ in range(2):  # the first fits the codes
            made.model.zero_grad()
            if made is at_once:
                step(made.model, optimizer, *batch(made))
            else:
                step.losses(made.model, *batch(made)).sum().backward()
        gradients.append({name: p.grad for name, p in made.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@each_backbone
def test_the_gradient_of_a_vote_at_a_border_is_computed_in_pieces(backbone, monkeypatch):
    made = make(backbone, "side")
    tap = made.model.s2a["side"].taps[0]
    h = torch.randn(4, *made.blocks[0].output.shape, requires_grad=True)
    whole = tap.tokens(h)
    upstream = torch.randn_like(whole)
    monkeypatch.setattr(side, "PIECE", h[:3].numel())
    with remember(quant(2)):  # no code is made of it
        read = side.Read.apply(h, tap)
        found = torch.autograd.grad(read, h, upstream)[0]
    assert torch.equal(read, whole)
    torch.testing.assert_close(found, torch.autograd.grad(whole, h, upstream)[0])


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


def test_vit_b_trains_at_most_0_9_percent():
    config = BackboneConfig(name="vit_b", timm="vit_base_patch16_224.orig_in21k", pretrained=False)
    made = backbones.build(config, 100, meta=True)
    METHODS["s2a"](OmegaConf.structured(METHODS["s2a"].Config(name="s2a", lr=1e-3))).attach(made)
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


def test_segments_of_blocks_that_share_a_trained_part_are_refused():
    config = BackboneConfig(name="shared", timm="vit_srelpos_small_patch16_224", pretrained=False, kwargs=dict(depth=2, embed_dim=48, num_heads=2))
    for segments, refused in ((1, False), (2, True)):
        made = backbones.build(config, CLASSES)
        METHODS["s2a"](made_config("vit", "s2a", segments=segments)).attach(made)
        with pytest.raises(UserError, match="share a trained part") if refused else nullcontext():
            made.model.train()(torch.randn(1, 3, 224, 224))


def test_parts_of_s2a_can_be_switched_off():
    made = make("vit", "s2a", bias=False, side=None)
    trainable = {n for n, p in made.model.named_parameters() if p.requires_grad}
    assert all(n.startswith(("s2a.prompt", "head.")) for n in trainable)
