"""Predictions against real CPU tensors (to the byte), closed formulas, and known peaks; the model is left as found."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from s2a_cli.memory import predict, track

MIB = 2**20
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48}, 32),
    "resnet": ("resnet18", {}, 64),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32},
        56,
    ),
    "convnext": ("convnext_atto", {}, 64),
    "mobilenet": ("mobilenetv3_small_050", {}, 64),
}

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
OPTIMISERS = [
    (AdamW, {}, 3),
    (SGD, {"momentum": 0.9}, 2),
    (SGD, {}, 1),
]  # copies of the trainable weights, state included


def train_step(model, optimizer, images, targets, *, after_forward, micro_batch=None, forward_context=nullcontext):
    size = micro_batch or len(images)
    for x, y in zip(images.split(size), targets.split(size), strict=True):
        with forward_context():
            loss = F.cross_entropy(model(x), y)
        after_forward()
        loss.backward()
        del loss
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def optimizer_for(model, kind=AdamW, **kwargs):
    return kind([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-4, **kwargs)


def tune(model, what):
    """Freezes what full | bias | linear does not train; BatchNorms stay on their statistics unless all is trained."""
    head = {id(p) for p in model.get_classifier().parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(what == "full" or id(parameter) in head or (what == "bias" and name.endswith("bias")))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(what == "full")
    return model


def small(name, what="full"):
    timm_name, kwargs, size = MODELS[name]
    torch.manual_seed(0)
    model = tune(timm.create_model(timm_name, num_classes=10, **kwargs), what)
    return model, (torch.randn(4, 3, size, size), torch.arange(4))


class LinspaceOnCpu(torch.overrides.TorchFunctionMode):
    """Makes linspace on the CPU: older timm reads drop path rates off one, which a meta device can't give."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        default = {"device": "cpu"} if func is torch.linspace else {}
        return func(*args, **(default | (kwargs or {})))


def on_meta(name, what, batch_size=64, size=224, dtype=torch.float32, **kwargs):
    with torch.device("meta"), LinspaceOnCpu():
        model = tune(timm.create_model(name, num_classes=100, **kwargs).to(dtype), what)
        return model, (torch.empty(batch_size, 3, size, size, dtype=dtype), torch.empty(batch_size, dtype=torch.long))


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize("what", ["full", "bias", "linear"])
@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_real_cpu_tensors_to_the_byte(name, what):
    model, batch = small(name, what)
    predicted = predict(model, batch, train_step, optimizer_for)
    # Without oneDNN, which computes a convolution's weight gradient whenever it computes the bias's.
    with torch.backends.mkldnn.flags(enabled=False):
        assert predicted == track(model, batch, train_step, optimizer_for)
    assert predicted.kind == "predicted"
    assert predicted.static_mib > 0 and predicted.kept_mib > 0
    assert predicted.static_mib + predicted.kept_mib < predicted.peak_mib


@pytest.mark.parametrize("kind, kwargs, copies", OPTIMISERS)
def test_agrees_for_every_optimiser(kind, kwargs, copies):
    model, batch = small("vit")
    make = partial(optimizer_for, kind=kind, **kwargs)
    assert predict(model, batch, train_step, make) == track(model, batch, train_step, make)


def test_static_is_weights_buffers_and_optimiser_state():
    model, batch = on_meta("vit_base_patch16_224", "full", batch_size=2, depth=2)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
    for kind, kwargs, copies in OPTIMISERS:
        memory = predict(model, batch, train_step, partial(optimizer_for, kind=kind, **kwargs))
        assert memory.static_mib == pytest.approx(copies * weights, rel=1e-3)
        # With so few images the update is the peak: the gradients, and one list of as many temporary values (AdamW's
        # square roots, SGD's gradients with weight decay).
        assert memory.peak_mib == pytest.approx((copies + 2) * weights, rel=0.02)


@pytest.mark.parametrize("what, bytes_an_element", [("full", 64), ("bias", 40)])
def test_a_vit_block_keeps_what_the_formula_says(what, bytes_an_element):
    """Counts bytes an element of [B, N, C] and block, in fp32 with fused attention.

    The LN inputs take 4 + 4, q k v 12, attention's output 4, the GELU input 16. Where weights train, the LN outputs
    take 4 + 4 and the GELU output 16.
    """
    kept = [
        predict(*on_meta("vit_base_patch16_224", what, 8, depth=d), train_step, optimizer_for).kept_mib for d in (1, 2)
    ]
    assert (kept[1] - kept[0]) * MIB / (8 * 197 * 768) == pytest.approx(bytes_an_element, rel=0.03)


def test_half_precision_halves_the_bytes():
    whole = predict(*on_meta("vit_base_patch16_224", "full", 8, depth=2), train_step, optimizer_for)
    half = predict(
        *on_meta("vit_base_patch16_224", "full", 8, depth=2, dtype=torch.bfloat16), train_step, optimizer_for
    )
    assert half.peak_mib / whole.peak_mib == pytest.approx(0.5, rel=0.02)
    assert half.static_mib / whole.static_mib == pytest.approx(0.5, rel=0.02)


# Peaks in MiB of batch 64 at 224 px with AdamW. Full, bias and linear of ViT-B/16, ResNet-50 and Swin-B.
PEAKS = [
    ("vit_base_patch16_224", "full", torch.float32, 8315, 7213),
    ("vit_base_patch16_224", "full", torch.bfloat16, 4161, None),
    ("vit_base_patch16_224", "bias", torch.float32, 5140, 4553),
    ("resnet50", "full", torch.float32, 5565, 5244),
    ("resnet50", "bias", torch.float32, 5383, 5244),
    ("resnet50", "linear", torch.float32, 766, 37),
    pytest.param("swin_base_patch4_window7_224", "full", torch.float32, 14891, None, marks=pytest.mark.slow),
    pytest.param("swin_base_patch4_window7_224", "bias", torch.float32, 8763, None, marks=pytest.mark.slow),
    pytest.param("swin_base_patch4_window7_224", "linear", torch.float32, 1598, 37, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, what, dtype, peak, kept", PEAKS)
def test_known_peaks(name, what, dtype, peak, kept):
    memory = predict(*on_meta(name, what, dtype=dtype), train_step, optimizer_for)
    assert memory.peak_mib == pytest.approx(peak, rel=0.01)
    assert kept is None or memory.kept_mib == pytest.approx(kept, rel=0.01)


def test_what_a_linear_probe_of_vit_b_holds():
    """Explains 771 MiB that are needed, and two more [B, N, C] of 37 MiB that timm's own forward holds.

    These are the embedded tokens, in a variable while the blocks run, and the last hidden state, pinned by the class
    token that is a view of it.
    """
    model, batch = on_meta("vit_base_patch16_224", "linear")
    tokens = 64 * 197 * 768 * 4 / MIB
    stock = predict(model, batch, train_step, optimizer_for)

    def lean_forward(images):
        x = model._pos_embed(model.patch_embed(images))
        for block in model.blocks:
            x = block(x)
        return model.head(model.norm(x)[:, 0].clone())

    model.forward = lean_forward
    lean = predict(model, batch, train_step, optimizer_for)
    assert lean.peak_mib == pytest.approx(771, rel=0.002) and lean.kept_mib == pytest.approx(37, rel=0.002)
    assert stock.peak_mib - lean.peak_mib == pytest.approx(tokens, rel=0.001)
    assert stock.kept_mib - lean.kept_mib == pytest.approx(tokens, rel=0.01)


def test_micro_batches_lower_the_peak():
    model, batch = on_meta("vit_base_patch16_224", "bias", 16, depth=2)
    whole = predict(model, batch, train_step, optimizer_for)
    quarter = predict(model, batch, partial(train_step, micro_batch=4), optimizer_for)
    images = 16 * 3 * 224**2 * 4 / MIB
    assert quarter.static_mib == whole.static_mib
    assert quarter.kept_mib - images == pytest.approx((whole.kept_mib - images) / 4, rel=0.03)
    assert quarter.peak_mib < whole.peak_mib - 0.7 * (whole.kept_mib - images)


def test_amp_keeps_less():
    context = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    model, batch = on_meta("vit_base_patch16_224", "full", 8, depth=2)
    whole = predict(model, batch, train_step, optimizer_for)
    amp = predict(model, batch, partial(train_step, forward_context=context), optimizer_for)
    assert amp.static_mib == whole.static_mib and amp.kept_mib < 0.8 * whole.kept_mib


def snapshot(model):
    """Returns all that a prediction must give back: the same objects, with the same values, flags and gradients."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    described = {name: (id(t), t.requires_grad, t.grad, t._version, t.detach().clone()) for name, t in tensors.items()}
    return described, [m.training for m in model.modules()], torch.get_rng_state()


def assert_same(before, after):
    assert before[0].keys() == after[0].keys() and list(before[0]) == list(after[0])
    for name, facts in before[0].items():
        assert facts[:-1] == after[0][name][:-1], name
        assert torch.equal(facts[-1], after[0][name][-1]), name
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])


def failing_step(model, optimizer, images, targets, *, after_forward):
    model.eval()
    model(images).sum().backward()
    raise ArithmeticError("in the middle of a step")


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_the_model_is_left_as_found(name):
    model, batch = small(name, "bias")
    before = snapshot(model)
    predict(model, batch, train_step, optimizer_for)
    assert_same(before, snapshot(model))
    with pytest.raises(ArithmeticError, match="in the middle"):
        predict(model, batch, failing_step, optimizer_for)
    assert_same(before, snapshot(model))
    train_step(model, optimizer_for(model), *batch, after_forward=lambda: None)  # and it still trains
    assert any(p.grad is not None for p in model.parameters())


def test_a_step_that_never_says_that_forward_is_over_is_refused():
    with pytest.raises(ValueError, match="must call after_forward"):
        predict(*small("vit"), lambda model, optimizer, images, targets, after_forward: None, optimizer_for)


def test_tied_parameters_count_once_and_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    model, batch = Tied(), (torch.randn(2, 256), torch.arange(2))
    make = partial(torch.optim.SGD, lr=0.1)
    memory = predict(model, batch, train_step, lambda m: make(m.parameters()))
    assert memory.static_mib == 256 * 256 * 4 / MIB
    assert model.second.weight is model.first.weight


def test_hooks_that_hold_submodules_go_on_working():
    model, batch = small("vit", "linear")
    model.extra = nn.Linear(48, 48)
    model.blocks[0].register_forward_hook(lambda module, args, out: out + model.extra(out))
    with_extra = predict(model, batch, train_step, optimizer_for)
    assert with_extra == track(model, batch, train_step, optimizer_for)
    model.extra.requires_grad_(False)
    assert predict(model, batch, train_step, optimizer_for).kept_mib < with_extra.kept_mib


@torch.library.custom_op("s2a_memory_test::signs", mutates_args=())
def signs(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).to(torch.uint8)


@signs.register_fake
def _(x):
    return torch.empty_like(x, dtype=torch.uint8)


class LeanReLU(torch.autograd.Function):
    """A ReLU that keeps a byte an element, in a custom operator."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(signs(x))
        return F.relu(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class LeanMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return LeanReLU.apply(args[0]) if func is F.relu else func(*args, **(kwargs or {}))


class Sandwich(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(512, 512), nn.Linear(512, 10)
        self.second.weight.requires_grad_(False)  # keeps no input, so that only ReLU keeps something

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


def test_custom_operators_functions_and_function_modes():
    model, batch = Sandwich(), (torch.randn(64, 512), torch.arange(64) % 10)
    lean = partial(train_step, forward_context=LeanMode)
    predicted = predict(model, batch, lean, optimizer_for)
    assert predicted == track(model, batch, lean, optimizer_for)
    saving = predict(model, batch, train_step, optimizer_for).kept_mib - predicted.kept_mib
    assert saving * MIB == 64 * 512 * (4 - 1)  # bytes


def test_a_gradient_scaler_finds_finite_gradients():
    """Fails where the flag "a gradient is infinite" is read as true: the update is left out, AdamW has no state."""
    scaler = torch.amp.GradScaler("cpu")

    def step(model, optimizer, images, targets, *, after_forward):
        loss = F.cross_entropy(model(images), targets)
        after_forward()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    model, batch = small("vit")
    plain = predict(model, batch, train_step, optimizer_for)
    assert predict(model, batch, step, optimizer_for).static_mib == pytest.approx(plain.static_mib, abs=0.01)


def test_result_block():
    model, batch = small("vit", "linear")
    full = predict(*small("vit"), train_step, optimizer_for)
    block = predict(model, batch, train_step, optimizer_for).against(full).as_dict()
    assert set(block) == {
        "kind", "peak_mib", "static_mib", "kept_mib", "reserved_mib", "full_finetune_peak_mib", "full_finetune_kind",
    }  # fmt: skip
    assert block["kind"] == block["full_finetune_kind"] == "predicted" and block["reserved_mib"] is None
    assert block["full_finetune_peak_mib"] == round(full.peak_mib, 2) > block["peak_mib"]


class Odd(nn.Module):
    """A layer whose weight has a sparse change, of which a mask chooses the values."""

    def __init__(self, reads: str = ""):
        super().__init__()
        self.weight, self.reads = nn.Parameter(torch.randn(64, 32), requires_grad=False), reads
        self.change = nn.Parameter(torch.randn(100))
        self.register_buffer("places", torch.stack([torch.arange(100) % 64, torch.arange(100) % 32]))
        self.register_buffer("mask", torch.ones(100, dtype=torch.bool))

    def forward(self, x):
        places, values = self.places[:, self.mask], self.change.masked_select(self.mask)
        sparse = torch.sparse_coo_tensor(places[:, self.mask.nonzero()[:, 0]], values, self.weight.shape)
        if self.reads == "sparse":
            return torch.sparse.mm(sparse, x.mT).mT
        if self.reads == "data":
            return x @ self.weight.new_empty(32, torch.unique(places).numel())
        weight = self.weight.clone()
        weight += sparse
        return x @ weight.mT


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_tensors_and_masks_that_choose_all_agree_to_the_byte():
    arguments = Odd(), (torch.randn(8, 32), torch.arange(8)), train_step, optimizer_for
    assert predict(*arguments) == track(*arguments)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    "reads, operator", [("sparse", "aten._sparse_addmm|aten._sparse_mm|addmm"), ("data", "unique")]
)
def test_an_operator_that_cannot_be_predicted_is_named(reads, operator):
    with pytest.raises((NotImplementedError, RuntimeError), match=operator):
        predict(Odd(reads), (torch.randn(8, 32), torch.arange(8)), train_step, optimizer_for)
