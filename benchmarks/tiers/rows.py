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
from dataclasses import asdict
from typing import Any, cast

import torch
from omegaconf import DictConfig
from row_list import BY_NAME, ROWS, Row
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from s2a_cli import backbones, memory, methods
from s2a_cli.backbones import Backbone
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.memory.predict import dataless_tensors
from s2a_cli.training.forecast import graphed
from s2a_cli.training.step import AUTOCAST, Step, convert, make_optimizer, moving_norms, train_mode

__all__ = ["BY_NAME", "ROWS", "Row"]  # of row_list.py, for those who make rows
CLASSES = 100
BUILT = 4  # backbones that are kept to be copied: making ViT-B anew takes seconds
Batch = tuple[Tensor, Tensor]  # images [B, 3, H, W], targets [B]
Entry = dict[str, Any]  # a row of a result file
HEAD_STD = 0.05  # of the random head: timm's own is so small that hardly a gradient reaches the backbone


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
        convert(self.model, self.config)
        if self.config.backbone.weights != "fp32":
            from s2a_cli.backbones import frozen_weights

            frozen_weights.store(self.backbone, self.config.backbone.weights, AUTOCAST.get(self.config.precision))
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
    pixels = torch.empty(batch, 3, size, size, dtype=made.step.dtype).to(memory_format=made.step.layout)
    images = pixels, torch.empty(batch, dtype=torch.int64)
    step = made
    if row.offload:
        step = _offloaded(made)
    elif row.budget is not None:
        step = _partitioned(made)
    if row.budget is None:
        step = graphed(step, made.config.optim.micro_batch) if made.config.cuda_graphs else step
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
