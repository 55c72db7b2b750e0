"""The side branch: what it reads, its votes, when they are learned from, and segments that they train."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
from layouts import CLASSES, batch, each_backbone, loss_of, made_config, make, make_attached, quant
from omegaconf import OmegaConf
from torch.nn import functional as F

from s2a_cli import backbones
from s2a_cli.activations import compress_activations
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.config.schema import BackboneConfig, QuantConfig
from s2a_cli.methods import STRUCTURES
from s2a_cli.methods.parts import attention_pooling
from s2a_cli.methods.parts.attention_pooling import STEP, Attend
from s2a_cli.methods.parts.deep_supervision import losses_of
from s2a_cli.training.step import Step, train_mode


@each_backbone
@pytest.mark.parametrize("settings", [{}, {"segments": 2}])
def test_a_step_learns_from_each_large_vote_before_the_next_block(backbone, settings, set_chunk_sizes):
    set_chunk_sizes(read=1)
    attached = make_attached(backbone, "s2a", **settings)
    made = attached.backbone
    train_mode(made.model)
    readers, seen = made.model.s2a["side"].readers, []
    for block in made.blocks[1:]:
        block.module.register_forward_pre_hook(
            lambda *_: seen.append([reader.classifier.bias.grad is not None for reader in readers])
        )
    optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=0.1)
    Step(compose(["method=s2a", "quant=none"]), torch.device("cpu"), attached)(made.model, optimizer, *batch(made))
    count = len(made.blocks)
    assert seen == [[tap < done for tap in range(count)] for done in range(1, count)]


@each_backbone
@pytest.mark.parametrize("settings", [{}, {"segments": 2}])
def test_small_votes_of_one_shape_are_learned_from_together(backbone, settings, set_chunk_sizes):
    """But for those at borders, whose losses are due at once. Gradients are those of one vote at a time."""
    gradients, sizes = [], []
    for read in (1, 1 << 20):
        set_chunk_sizes(read=read)
        made = make(backbone, "s2a", **settings)
        branch, shapes = made.model.s2a["side"], []
        for reader in branch.readers:
            reader.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(3))
        for feature in branch.features:
            feature.register_forward_hook(lambda _, __, tokens, shapes=shapes: shapes.append(tokens.shape))
        train_mode(made.model)
        images, targets = batch(made)
        sizes.clear()

        def learn(heads, logits, targets=targets):
            sizes.append(len(logits))
            losses_of(logits, targets).sum().backward()

        with branch.learning(learn):
            losses = losses_of(made.model(images), targets)
        losses.sum().backward()
        gradients.append({name: p.grad for name, p in made.model.named_parameters() if p.grad is not None})
    groups = [len(list(same)) for _, same in itertools.groupby(shapes)]  # of what stands at no border
    assert sorted(sizes) == sorted([*groups, *(1 for _ in branch.borders)])
    one_by_one, together = gradients
    assert one_by_one.keys() == together.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, one_by_one[name], msg=name)


def loss_and_gradients(attached):
    """Of the pass of a training step, and the mean of the losses of all heads, outside of it."""
    made = attached.backbone
    step, (images, targets) = Step(compose(["method=side", "quant=none"]), torch.device("cpu"), attached), batch(made)
    made.model.zero_grad()
    loss = step.accumulate(made.model, images, targets)
    gradients = {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}
    return loss, gradients, losses_of(made.model(images), targets).mean()


def with_votes(backbone, method="side", **settings):
    attached = make_attached(backbone, method, **settings)
    for reader in attached.model.s2a["side"].readers:
        reader.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(3))
    train_mode(attached.model)
    return attached


@each_backbone
@pytest.mark.parametrize("frozen", [0, 1])
def test_the_loss_of_a_step_is_the_mean_of_all_heads(backbone, frozen):
    """Also where some are learned from in the forward pass and others are not, as those of a frozen reader are not."""
    attached = with_votes(backbone)
    for reader in attached.model.s2a["side"].readers[:frozen]:
        reader.requires_grad_(False)
    loss, _, mean = loss_and_gradients(attached)
    torch.testing.assert_close(loss, mean)


@each_backbone
@pytest.mark.parametrize("settings", [{}, {"segments": 2}])
def test_a_step_through_checkpoints_of_pytorch_learns_the_same(backbone, settings):
    attached = with_votes(backbone, "s2a", **settings)
    loss, gradients, _ = loss_and_gradients(attached)
    attached.model.set_grad_checkpointing(True)
    again, found, _ = loss_and_gradients(attached)
    torch.testing.assert_close(again, loss)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("count", [1, 2])
def test_blocks_of_which_some_are_compiled_learn_the_same(count):
    """As they are where the compiler gives up on further ones; what a compiled hook handed on is taken once."""
    attached = with_votes("swin")
    loss, gradients, _ = loss_and_gradients(attached)
    for block in attached.blocks[:count]:
        block.compile(backend="eager")
    for _ in range(2):
        again, found, _ = loss_and_gradients(attached)
        torch.testing.assert_close(again, loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    torch.compiler.reset()


def test_the_gradient_of_queries_fits_half_precision_where_it_is_small_enough():
    """Codes are up to 127, tokens an eighth of that: the sum over them is of tokens."""
    tokens, query = torch.full((1, 2, 64, 8), 127, dtype=torch.int8), torch.zeros(1, 4, 8, requires_grad=True)
    tokens[:, :, ::2] = -127
    with torch.autocast("cpu", torch.float16):
        read = Attend.apply(tokens, query)
    upstream = torch.full_like(read, 14.0)
    gradient = torch.autograd.grad(read, query, upstream)[0]
    expected = 2 * 8 * 14.0 * (127 / 8) ** 2  # over 2 images and 8 channels, of variance (127 / 8)^2
    assert 65504 / 8 < expected < 65504
    torch.testing.assert_close(gradient, torch.full_like(gradient, expected), rtol=1e-2, atol=0)


@each_backbone
def test_a_side_branch_sends_no_gradient_through_the_backbone(backbone):
    made = make(backbone, "side")
    seen = []
    made.blocks[0].module.register_forward_hook(lambda _, __, h: seen.append(h.requires_grad))
    loss_of(made).backward()
    assert seen == [False]


@each_backbone
def test_a_tap_in_pieces_is_the_tap_of_the_whole_batch(backbone, set_chunk_sizes):
    made = make(backbone, "side")
    images, _ = batch(made)
    tap, outputs = made.model.s2a["side"].features[0], []
    made.blocks[0].module.register_forward_hook(lambda _, __, h: outputs.append(h.detach()))
    with torch.no_grad():
        made.model(images)
    whole = tap(outputs[0])
    set_chunk_sizes(pooled=outputs[0][:3].numel())
    assert torch.equal(tap(outputs[0]), whole) and whole.dtype == torch.int8 and len(whole) == 4


def test_a_side_branch_reads_as_its_formula_says():
    """The gradient of the queries against autograd's in float64; kept are the codes once, and the weights."""
    tokens, query = (
        torch.randint(-127, 128, (2, 3, 10, 16), dtype=torch.int8),
        torch.randn(2, 4, 16, dtype=torch.float64, requires_grad=True),
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        read = Attend.apply(tokens, query)
    t = tokens.double() * STEP
    exact = torch.softmax(torch.einsum("gbnc,ghc->gbhn", t, query), -1) @ t
    torch.testing.assert_close(read, exact)
    upstream = torch.randn_like(read)
    torch.testing.assert_close(
        *(torch.autograd.grad(output, query, upstream)[0] for output in (read, exact)), rtol=1e-10, atol=1e-12
    )
    assert {(t.dtype, t.numel()) for t in kept} == {(torch.int8, 2 * 3 * 10 * 16), (torch.float64, 2 * 3 * 10 * 4)}
    assert len(kept) == 2


@each_backbone
@pytest.mark.parametrize("method", ["linear", "side"])
def test_a_tail_alone_computes_and_trains_what_the_model_does(backbone, method):
    attached, whole = make_attached(backbone, method), make(backbone, method)
    made, tail = attached.backbone, attached.feature_head
    for one in (made, whole):
        torch.manual_seed(2)
        for p in one.model.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn_like(p)
    train_mode(made.model), train_mode(whole.model)
    images, targets = batch(made)
    taps, logits = tail.capture(lambda: made.model(images))
    assert {t.dtype for t in taps.tensors[1:]} <= {torch.int8} and len(taps.tensors) == 1 + (method == "side") * len(
        made.blocks
    )
    assert not any(t.requires_grad for t in taps.tensors)
    assert torch.equal(tail(taps), logits) and torch.equal(tail(taps), whole.model(images))
    losses_of(tail(taps), targets).sum().backward()
    losses_of(whole.model(images), targets).sum().backward()
    for (name, one), two in zip(made.model.named_parameters(), whole.model.parameters()):
        assert (one.grad is None) == (two.grad is None) and (one.grad is None or torch.equal(one.grad, two.grad)), name
    assert sum(p.numel() for p in tail.parameters()) == sum(
        p.numel() for p in made.model.parameters() if p.requires_grad
    )


@each_backbone
def test_the_votes_of_head_and_branch_leave_each_other_alone(backbone):
    """With the side branch, biases and head get the gradients that they get without; and the branch those of its own
    vote.
    """
    alone, both = make(backbone, "bias"), make(backbone, "s2a", prompt=None)
    branch = both.model.s2a["side"]
    torch.manual_seed(3)
    for reader in branch.readers:
        reader.classifier.weight.data.normal_()
    for made in (alone, both):
        train_mode(made.model)
        loss_of(made).backward()
    found = dict(both.model.named_parameters())
    for name, p in alone.model.named_parameters():
        assert (p.grad is None) == (found[name].grad is None) and (
            p.grad is None or torch.equal(p.grad, found[name].grad)
        ), name
    images, targets = batch(both)
    head, *votes = both.model(images)
    for reader, vote in zip(branch.readers, votes, strict=True):
        loss = F.cross_entropy(vote, targets)
        wanted = torch.autograd.grad(loss, reader.classifier.weight, retain_graph=True)[0]
        torch.testing.assert_close(reader.classifier.weight.grad, wanted)
    with torch.no_grad():
        torch.testing.assert_close(both.model.eval()(images), (head + sum(votes) * 2 / len(votes)) / 3)


@each_backbone
def test_no_gradient_leaves_a_segment(backbone):
    """What stands before the border learns by the vote there alone, what follows by the head's alone."""
    made, alone = make(backbone, "s2a", prompt=None, segments=2), make(backbone, "bias")
    border = len(made.blocks) // 2 - 1
    branch, block = made.model.s2a["side"], alone.blocks[border]
    assert branch.borders == {border}
    torch.manual_seed(3)
    for reader in branch.readers:
        reader.classifier.weight.data.normal_()
    states = []
    block.module.register_forward_hook(lambda _, __, h: states.append(h) or h.detach())
    for one in (made, alone):
        train_mode(one.model)
        loss_of(one).backward()
    reader, tokens = branch.readers[border], branch.features[border].tokens(states[0])
    weights = torch.softmax(torch.einsum("bnc,hc->bhn", tokens, reader.query), -1)
    read = torch.einsum("bhn,bnc,hcw->bhw", weights, tokens, reader.value)
    F.cross_entropy(reader.classifier(reader.norm(read.flatten(1))), batch(made)[1]).backward()
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
    """Blocks that are computed again within the forward pass, where votes are learned from, make the codes that they
    make after it.
    """
    codes = QuantConfig(name="codes", recompute="block", input=8, pointwise=4, norm=4, attention=4)
    at_once, after = (make_attached(backbone, "s2a", segments=2) for _ in range(2))
    gradients = []
    for made in (at_once, after):
        torch.manual_seed(3)
        for reader in made.model.s2a["side"].readers:
            reader.classifier.weight.data.normal_()
        train_mode(made.model)
        optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=0.0)
        optimizer.zero_grad = lambda set_to_none: None
        step = Step(
            OmegaConf.merge(compose(["method=s2a"]), {"quant": OmegaConf.structured(codes)}),
            torch.device("cpu"),
            made,
        )
        for _ in range(2):  # the first fits the codes
            made.model.zero_grad()
            if made is at_once:
                step(made.model, optimizer, *batch(made.backbone))
            else:
                step.losses(made.model, *batch(made.backbone)).sum().backward()
        gradients.append({name: p.grad for name, p in made.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@each_backbone
def test_the_gradient_of_a_vote_at_a_border_is_computed_in_pieces(backbone, set_chunk_sizes):
    made = make(backbone, "side")
    tap = made.model.s2a["side"].features[0]
    h = torch.randn(4, *made.blocks[0].output.shape, requires_grad=True)
    whole = tap.tokens(h)
    upstream = torch.randn_like(whole)
    set_chunk_sizes(pooled=h[:3].numel())
    with compress_activations(quant(2)):  # no code is made of it
        read = attention_pooling.DifferentiableFeature.apply(h, tap)
        found = torch.autograd.grad(read, h, upstream)[0]
    assert torch.equal(read, whole)
    torch.testing.assert_close(found, torch.autograd.grad(whole, h, upstream)[0])


def test_segments_of_blocks_that_share_a_trained_part_are_refused():
    config = BackboneConfig(
        name="shared",
        timm="vit_srelpos_small_patch16_224",
        pretrained=False,
        kwargs=dict(depth=2, embed_dim=48, num_heads=2),
    )
    for segments, refused in ((1, False), (2, True)):
        made = backbones.build(config, CLASSES)
        STRUCTURES["s2a"](made_config("vit", "s2a", segments=segments)).attach(made)
        with pytest.raises(UserError, match="share a trained part") if refused else nullcontext():
            made.model.train()(torch.randn(1, 3, 224, 224))
