"""The rows of benchmarks/tiers/tiers.py: ways to fine-tune a backbone, ours and those to compare with, made ready to
train.

A row is words of a run's config, and what stock PyTorch, timm, peft or the compiler add to the same model. All rows
train with the product's own Step: the same loss, optimiser, precision and data.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from s2a_cli import backbones, memory, methods
from s2a_cli.backbones import Backbone
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.memory.predict import dataless_tensors
from s2a_cli.training.step import Step, make_optimizer, moving_norms, train_mode, weight_dtype

CLASSES = 100
BUILT = 4  # backbones that are kept to be copied: making ViT-B anew takes seconds
Batch = tuple[Tensor, Tensor]  # images [B, 3, H, W], targets [B]
Entry = dict[str, Any]  # a row of a result file
HEAD_STD = 0.05  # of the random head: timm's own is so small that hardly a gradient reaches the backbone


def checkpoint(backbone: Backbone) -> None:
    """timm's gradient checkpointing (arXiv 1604.06174), a segment a block."""
    model: Any = backbone.model
    if not hasattr(model, "set_grad_checkpointing"):
        raise UserError(f"timm's {type(model).__name__} has no gradient checkpointing")
    model.set_grad_checkpointing()


def selective(backbone: Backbone) -> None:
    """PyTorch's selective checkpointing, a segment a block: products and attention are kept, the rest is made again."""
    aten = torch.ops.aten
    kept = {
        *(aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default),
        *(aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default),
        *(aten._scaled_dot_product_flash_attention_for_cpu.default, aten._scaled_dot_product_cudnn_attention.default),
    }
    contexts = functools.partial(create_selective_checkpoint_contexts, list(kept))
    for block in backbone.blocks:
        block.module.forward = functools.partial(
            torch_checkpoint, block.module.forward, use_reentrant=False, context_fn=contexts
        )


def unfuse(backbone: Backbone) -> None:
    """Attention as products and a softmax, as before fused kernels."""
    fused: list[Any] = [module for module in backbone.model.modules() if getattr(module, "fused_attn", False)]
    if not fused:
        raise UserError("the backbone has no fused attention")
    for module in fused:
        module.fused_attn = False


def lora(backbone: Backbone) -> None:
    """peft's LoRA (arXiv 2106.09685) of rank 8 on the product that makes q, k and v; the head trains too, biases do
    not.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # pyright: ignore[reportMissingImports] (of the extra `bench`)
    except ImportError:
        raise UserError("needs a package that is not here: pip install peft") from None
    if not any(name.endswith(".qkv") for name, _ in backbone.model.named_modules()):
        raise UserError("LoRA on qkv: the backbone has no layer of that name")
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"]), backbone.model)
    for parameter in backbone.head.parameters():
        parameter.requires_grad_(True)


def checkpointed_lora(backbone: Backbone) -> None:
    lora(backbone)
    checkpoint(backbone)


@dataclass(frozen=True)
class Row:
    name: str  # in rows=
    title: str
    words: tuple[str, ...]  # of the config
    ours: bool = False
    change: Callable[[Backbone], None] | None = None  # what others' code does to the model once the method is attached
    offload: bool = False  # what is kept lies in the host's memory
    budget: float | None = None  # of the compiler's activations
    graph: bool = False  # forward and backward pass are replayed as CUDA graphs


def _row(name: str, title: str, words: str, **settings) -> Row:
    return Row(name, title, tuple(words.split()), **settings)


BIAS, TINY8 = "method=bias quant=none", "quant=tiny quant.chunks=8"
ROWS = (
    _row("full", "full fine-tuning", "method=full quant=none"),
    _row("full-unfused", "full, unfused attention", "method=full quant=none", change=unfuse),
    _row("full-ckpt", "full + timm's checkpointing", "method=full quant=none", change=checkpoint),
    _row("linear", "linear probe", "method=linear quant=none"),
    _row("bias", "bias (BitFit), stock PyTorch", BIAS),
    _row("bias-ckpt", "bias + timm's checkpointing", BIAS, change=checkpoint),
    _row("lora", "LoRA qkv r8 (peft)", "method=linear quant=none", change=lora),
    _row("lora-ckpt", "LoRA qkv r8 + timm's checkpointing", "method=linear quant=none", change=checkpointed_lora),
    _row("bias-budget0.3", "bias, compiled, memory budget 0.3", BIAS, budget=0.3),
    _row("bias-budget0.1", "bias, compiled, memory budget 0.1", BIAS, budget=0.1),
    _row("bias-selective", "bias, selective checkpointing: products kept", BIAS, change=selective),
    _row("full-micro8", "full, micro-batches of 8", "method=full quant=none optim.micro_batch=8"),
    _row(
        "full-ckpt-micro8",
        "full + timm's checkpointing, micro-batches of 8",
        "method=full quant=none optim.micro_batch=8",
        change=checkpoint,
    ),
    _row("bias-micro16", "bias, micro-batches of 16", f"{BIAS} optim.micro_batch=16"),
    _row("bias-micro8", "bias, micro-batches of 8", f"{BIAS} optim.micro_batch=8"),
    _row("bias-micro4", "bias, micro-batches of 4", f"{BIAS} optim.micro_batch=4"),
    _row("bias-micro4-graph", "bias, micro-batches of 4 in CUDA graphs", f"{BIAS} optim.micro_batch=4", graph=True),
    _row("bias-micro2", "bias, micro-batches of 2", f"{BIAS} optim.micro_batch=2"),
    _row("bias-micro1", "bias, micro-batches of 1", f"{BIAS} optim.micro_batch=1"),
    _row(
        "bias-ckpt-micro16",
        "bias + timm's checkpointing, micro-batches of 16",
        f"{BIAS} optim.micro_batch=16",
        change=checkpoint,
    ),
    _row("lora-micro4", "LoRA qkv r8, micro-batches of 4", "method=linear quant=none optim.micro_batch=4", change=lora),
    _row("side", "side, stock PyTorch", "method=side quant=none"),
    _row("s2a", "s2a, stock PyTorch", "method=s2a quant=none"),
    _row("s2a-micro4", "s2a, micro-batches of 4", "method=s2a quant=none optim.micro_batch=4"),
    _row("bias-offload", "bias, save_on_cpu", BIAS, offload=True),
    _row("bias-recompute", "bias, recomputed blocks", f"{BIAS} quant.recompute=block", ours=True),
    _row("bias-recompute8", "the same in 8 pieces", f"{BIAS} quant.recompute=block quant.chunks=8", ours=True),
    _row("exact", "bias, quant=exact", "method=bias quant=exact", ours=True),
    _row("T1", "T1: bias, quant=paper", "method=bias quant=paper", ours=True),
    _row("T2", "T2: bias, quant=int5", "method=bias quant=int5", ours=True),
    _row("T2-s2a", "T2: s2a, quant=int5", "method=s2a quant=int5", ours=True),
    _row("T2-int4", "T2: bias, quant=int4", "method=bias quant=int4", ours=True),
    _row(
        "T2-int4-micro8",
        "T2: bias, quant=int4, micro-batches of 8",
        "method=bias quant=int4 optim.micro_batch=8",
        ours=True,
    ),
    _row(
        "segments",
        "s2a in 3 segments, quant=none; kept: of the last",
        "method=s2a method.segments=3 quant=none",
        ours=True,
    ),
    _row(
        "segments-int4",
        "s2a in 3 segments, quant=int4; kept: of the last",
        "method=s2a method.segments=3 quant=int4",
        ours=True,
    ),
    _row("only-pointwise", "bias, GELU' alone in 4 bits", "method=bias quant=exact quant.pointwise=4", ours=True),
    _row("only-norm", "bias, x^ alone in 4 bits", "method=bias quant=exact quant.norm=4", ours=True),
    _row("only-attention", "bias, q, k, v alone in 4 bits", "method=bias quant=exact quant.attention=4", ours=True),
    _row("T3", "T3: bias, quant=tiny", "method=bias quant=tiny", ours=True),
    _row(
        "T3-micro16",
        "T3: bias, quant=tiny, micro-batches of 16",
        "method=bias quant=tiny optim.micro_batch=16",
        ours=True,
    ),
    _row("T3-8", "T3 in 8 pieces", f"method=bias {TINY8}", ours=True),
    _row("T3-s2a", "T3: s2a, quant=tiny", "method=s2a quant=tiny", ours=True),
    _row("T3-s2a-8", "T3: s2a, in 8 pieces", f"method=s2a {TINY8}", ours=True),
    _row("T4", "T4: side, quant=tiny", "method=side quant=tiny", ours=True),
    _row("T4-8", "T4 in 8 pieces", f"method=side {TINY8}", ours=True),
    _row("T5-T3-int8", "T5: T3 in 8 pieces, weights int8", f"method=bias {TINY8} backbone.weights=int8", ours=True),
    _row("T5-T3-nf4", "T5: T3 in 8 pieces, weights NF4", f"method=bias {TINY8} backbone.weights=nf4", ours=True),
    _row("T5-T4-int8", "T5: T4 in 8 pieces, weights int8", f"method=side {TINY8} backbone.weights=int8", ours=True),
    _row("T5-T4-nf4", "T5: T4 in 8 pieces, weights NF4", f"method=side {TINY8} backbone.weights=nf4", ours=True),
)
BY_NAME = {row.name: row for row in ROWS}


class Made:
    """A row's model, config and step. Call: one training step, as `Step` is called."""

    def __init__(self, row: Row, words: list[str], device: torch.device, *, meta: bool = False):
        self.row, self.device, self.config = row, device, compose([*words, *row.words])
        self.backbone = _built(self.config, meta)
        torch.manual_seed(self.config.seed)  # the same values, whether the backbone was made or copied
        for layer in self.backbone.head.layers.values():
            nn.init.normal_(cast(Tensor, layer.weight), std=HEAD_STD)
        self.attached = methods.attach(self.config.method, self.backbone)
        if row.change:
            row.change(self.backbone)
        quant, micro = self.config.quant, self.config.optim.micro_batch
        if moving_norms(self.model) and (quant.recompute != "none" or quant.chunks != 1 or micro):
            raise UserError("BatchNorms that train see the whole batch: no pieces of it")
        self.model.to(weight_dtype(self.config.precision))
        if self.config.backbone.weights != "fp32":
            from s2a_cli.backbones import weight_quant

            weight_quant.store(self.backbone, self.config.backbone.weights)
        if not meta:
            self.model.to(device)
        train_mode(self.model)
        self.step = Step(self.config, device, self.attached)

    @property
    def model(self) -> nn.Module:
        return self.backbone.model

    def optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        return make_optimizer(self.config.optim, model or self.model, self.attached)

    def compile(self) -> None:
        if self.row.budget is not None:
            self.model.compile()
        if self.row.graph:
            if self.device.type != "cuda":
                raise UserError("CUDA graphs need a CUDA device")
            size, count = self.backbone.image.size, self.config.optim.micro_batch
            images = torch.zeros(count, 3, size, size, dtype=self.step.dtype, device=self.device)
            torch.cuda.make_graphed_callables(self.model, (images,))

    def around(self) -> AbstractContextManager:
        """What a step runs within."""
        if self.row.offload:
            return torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")
        if self.row.budget is not None:  # read when the first step compiles
            from torch._functorch import config as functorch

            return functorch.patch(activation_memory_budget=self.row.budget)
        return nullcontext()

    def __call__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, targets: Tensor, **kwargs: Any
    ) -> Tensor:
        with self.around():
            return self.step(model, optimizer, images, targets, **kwargs)


def _built(config: DictConfig, meta: bool) -> Backbone:
    """The backbone with the weights that the config's seed gives. A copy of one made before, where there is one."""
    if meta:
        return backbones.build(config.backbone, CLASSES, meta=True)
    key = f"{config.seed} {config.backbone}"
    if key not in _BUILT:
        torch.manual_seed(config.seed)
        if len(_BUILT) >= BUILT:
            del _BUILT[next(iter(_BUILT))]
        _BUILT[key] = backbones.build(config.backbone, CLASSES)
    return copy.deepcopy(_BUILT[key])


_BUILT: dict[str, Backbone] = {}


def noise(size: int, count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, size, size, generator=generator)
    return images, torch.randint(CLASSES, (count,), generator=generator)


def blank(row: Row) -> Entry:
    """The entry of a row before anything is known of it."""
    described = asdict(row) | {"change": row.change.__name__ if row.change else None, "words": list(row.words)}
    found = dict.fromkeys(("predicted", "measured", "parameters", "gradient", "seconds", "images_per_second"))
    return described | found | {"problems": {}}


def take_steps(made: Made, optimizer: torch.optim.Optimizer, host: Batch, meter: memory.CudaMeter, steps: int) -> None:
    """Steps on a batch of the host, as the meter wants them: nothing of a step is alive when the next begins."""
    for _ in range(steps):
        meter.step_begins()
        images, targets = host[0].to(made.device, made.step.dtype), host[1].to(made.device)
        made(made.model, optimizer, images, targets, after_forward=meter.after_forward)
        del images, targets
        meter.step_ends()


@contextmanager
def problems(entry: Entry, what: str) -> Iterator[None]:
    """What goes wrong inside is written into the row instead of stopping the run."""
    try:
        yield
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        entry["problems"][what] = first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"[:300]
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def predicted(row: Row, words: list[str], batch: int) -> memory.Memory:
    """The memory of a step of `batch` images in the steady state; of compiled rows what is kept alone, their peak is
    nan.
    """
    if row.graph:
        raise UserError("not predicted: what the pools of CUDA graphs take")
    made = Made(row, words, torch.device("cpu"), meta=True)
    size = made.backbone.image.size
    images = torch.empty(batch, 3, size, size, dtype=made.step.dtype), torch.empty(batch, dtype=torch.int64)
    step = made
    if row.offload:
        step = _offloaded(made)
    elif row.budget is not None:
        step = _partitioned(made)
    if row.budget is None:
        return memory.predict(made.model, images, step, made.optimizer)
    # Fake tensors throughout: the compiler's front end can't trace dataless ones.
    with FakeTensorMode(allow_non_fake_inputs=True), ReadsOnes(), dataless_tensors(made.model):
        found = memory.track(made.model, [torch.empty_like(t, device="cpu") for t in images], step, made.optimizer)
    return memory.Memory(found.kind, float("nan"), found.static_mib, found.kept_mib)


class ReadsOnes(TorchDispatchMode):
    """Reading a value, such as Adam's step counter, gives one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return 1.0 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def _offloaded(made: Made) -> Callable[..., Tensor]:
    """The step with what is kept out of the device's memory; save_on_cpu itself does nothing to CPU tensors."""

    def pack(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        return tensor.shape, tensor.dtype

    def unpack(kept: tuple[torch.Size, torch.dtype]) -> Tensor:
        return torch.empty(kept[0], dtype=kept[1])

    def step(*args, **kwargs) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return made.step(*args, **kwargs)

    return step


def _partitioned(made: Made) -> Callable[..., Tensor]:
    """The step with the model cut into a forward and a backward graph as the compiler cuts it.

    What is kept between the two is the compiler's choice; in which order it runs the backward graph, and what it fuses
    there, is not known without compiling, so that the peak is not.
    """
    import torch._inductor.lowering
    from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def as_it_is(gm: nn.Module, example_inputs: Any) -> Callable:
        return make_boxed_func(gm.forward)

    def forward(tensors: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(made.model, tensors, (images,))

    @functools.cache
    def cut(shape: torch.Size) -> Callable:  # a graph holds for one shape, and a prediction begins with a few images
        return aot_function(
            forward,
            fw_compiler=as_it_is,
            bw_compiler=as_it_is,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )

    def step(model: nn.Module, *args, **kwargs) -> Tensor:
        tensors = dict([*model.named_parameters(), *model.named_buffers()])

        def compiled(images: Tensor) -> Tensor:
            return cut(images.shape)(tensors, images)

        with made.around():
            return made.step(cast(nn.Module, compiled), *args, **kwargs)

    return step


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Random masks differ between a batch and its pieces: gradients are compared without any."""
    found = [m for m in model.modules() if type(m).__name__ in ("Dropout", "DropPath") and m.training]
    try:
        for module in found:
            module.eval()
        yield
    finally:
        for module in found:
            module.train()


def gradients(made: Made, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The gradients of the last of these batches, after steps without an update on those before; codes fit the first.

    {name: float64 [n] on the CPU} of all that trains.
    """
    with without_dropout(made.model), made.around():
        for images, targets in batches:
            made.model.zero_grad(set_to_none=True)
            torch.manual_seed(made.config.seed)
            made.step.losses(made.model, images.to(made.device), targets.to(made.device)).sum().backward()
    named = [(name, p.grad) for name, p in made.model.named_parameters() if p.grad is not None]
    return {name: grad.detach().cpu().double().flatten() for name, grad in named}
