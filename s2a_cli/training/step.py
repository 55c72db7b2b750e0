"""Takes one optimisation step: the same for training, for the prediction of its memory and for benchmarks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from s2a_cli import data
from s2a_cli.activations import ActivationMode, context_of
from s2a_cli.common import distributed
from s2a_cli.common.norms import is_batch_norm
from s2a_cli.config.schema import OptimConfig, QuantConfig, RunConfig
from s2a_cli.methods import Attachment
from s2a_cli.methods.parts.deep_supervision import losses_of
from s2a_cli.methods.parts.feature_head import Features
from s2a_cli.training.criterion import Criterion
from s2a_cli.training.cuda_graphs import PassGraphs
from s2a_cli.training.gradient_sum import GradientSum

Batch = Tensor | Features  # images [B, 3, H, W], or what a feature head reads of them
AnyBatch = TypeVar("AnyBatch", bound=Batch)
LAUNCHED = 5  # steps at least that are launched one by one: their memory can be measured, that of a replay can't
AUTOCAST = {"amp-bf16": torch.bfloat16, "amp-fp16": torch.float16}


def weight_dtype(precision: str) -> torch.dtype:
    """Returns what the weights are stored in: bfloat16 under `bf16`, float32 otherwise."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def convert(model: nn.Module, config: RunConfig | DictConfig) -> None:
    """Gives the parameters of a model the dtype and the layout that a config says."""
    model.to(weight_dtype(config.precision))
    if config.backbone.channels_last and config.backbone.weights != "offload":  # those stay where a file is mapped
        model.to(memory_format=torch.channels_last)


def set_matmul_precision(precision: str) -> None:
    """Sets whether CUDA multiplies and convolves fp32 in TF32, which rounds to 10 bits of mantissa: under `tf32` alone.

    PyTorch's own defaults differ between the two: matrix products don't, convolutions do.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def stays_in_pixels(config: OptimConfig | DictConfig) -> bool:
    """Tells whether a batch is in uint8 on the device until a micro-batch needs it; mixed images are none."""
    return config.micro_batch is not None and not (config.mixup or config.cutmix)


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._NormBase]:
    """Returns the BatchNorms of a model, and the InstanceNorms that have running statistics."""
    return [module for module in model.modules() if is_batch_norm(module)]


def moving_norms(model: nn.Module) -> list[nn.modules.batchnorm._NormBase]:
    """Returns the BatchNorms whose weight trains: they use the batch's statistics and move their running ones."""
    return [norm for norm in batch_norms(model) if trains(norm)]


def trains(norm: nn.modules.batchnorm._NormBase) -> bool:
    """Tells whether the weight of a normalisation trains."""
    return norm.weight is not None and norm.weight.requires_grad


def train_mode(model: nn.Module) -> None:
    """Puts a model into training mode, in which all other BatchNorms stay on their pretrained statistics."""
    hold_norms(model.train())


def hold_norms(model: nn.Module) -> None:
    """Puts the BatchNorms of a model that do not train on their pretrained statistics."""
    for norm in batch_norms(model):
        if not trains(norm):
            norm.eval()


def make_optimizer(config: OptimConfig, model: nn.Module, attached: Attachment | None = None) -> Optimizer:
    """Returns AdamW or SGD over the trainable parameters of a model.

    Weight decay is on weight matrices only, never on biases, norms and prompts. attached: what multiplies the learning
    rate of some modules.
    """
    groups = parameter_groups(model, config.lr, config.weight_decay, attached.learning_rates if attached else ())
    return SGD(groups, momentum=config.momentum) if config.name == "sgd" else AdamW(groups)


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, rates: Iterable[tuple[nn.Module, float]] = ()
) -> list[dict[str, Any]]:
    """Returns the trainable parameters of a model as groups for an optimiser, by learning rate and weight decay.

    Weight decay is on weight matrices only. rates: (module, factor) of modules whose learning rate is another.
    """
    scales = {p: factor for module, factor in rates for p in module.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}  # (learning rate, weight decay)
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = weight_decay if name.endswith("weight") and p.ndim > 1 else 0.0
            groups.setdefault((lr * scales.get(p, 1.0), decay), []).append(p)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


class Step:
    """Runs forward, backward and update of one batch under a run's precision, quantisation and accumulation.

    attached: what is trained; quant.recompute and quant.chunks are about its blocks. Call: step(model, optimizer,
    images [B, 3, H, W], targets [B] or [B, classes]) -> mean loss, a detached scalar, over the auxiliary heads too,
    whose losses are back-propagated within the forward pass. Images are normalised, or pixels in uint8, which are
    normalised a micro-batch at a time. `after_forward` is called after each forward pass, when all that is kept for the
    backward pass is alive (with local-loss segments: of the last one). Where several processes share a batch, `of` is
    its number of images, and the losses returned add up to its mean loss.
    criterion: (logits [B, classes], targets) -> mean loss; by default cross-entropy with the config's label smoothing.
    With cuda_graphs the passes of a step are replayed once codes are fitted; `after_forward` is not called then.
    """

    def __init__(
        self,
        config: RunConfig | DictConfig,
        device: torch.device,
        attached: Attachment,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self.optim, self.device, self.attached = config.optim, device, attached
        if device.type == "cuda":
            set_matmul_precision(config.precision)
        self.autocast_dtype = AUTOCAST.get(config.precision)
        self.dtype = weight_dtype(config.precision)
        self.layout = torch.channels_last if config.backbone.channels_last else torch.preserve_format
        # Operators read it at every call: a plain dataclass is ten times faster.
        quant = OmegaConf.to_object(config.quant) if isinstance(config.quant, DictConfig) else config.quant
        self.memory = context_of(cast(QuantConfig, quant), attached.blocks)
        self.criterion = criterion or Criterion(label_smoothing=config.optim.label_smoothing)
        self._sum: GradientSum | None = None
        alone = distributed.rank_and_world_size()[1] == 1  # others add up gradients within the backward pass
        self.graphs = PassGraphs() if config.cuda_graphs and device.type == "cuda" and alone else None
        self._taken = 0  # steps
        self.with_gradient: list[nn.Parameter] = []  # those that had one in the last step
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "amp-fp16")

    @property
    def calibration(self) -> dict[str, Any]:
        """What the codes of activations are fitted to so far, as a state; empty without codes."""
        return self.memory.calibration.state_dict() if isinstance(self.memory, ActivationMode) else {}

    @calibration.setter
    def calibration(self, state: dict[str, Any]) -> None:
        self.release()
        if isinstance(self.memory, ActivationMode):
            self.memory.calibration.load_state_dict(state)

    def release(self) -> None:
        """Gives back the memory of what is captured, such as for an evaluation; it is captured again when it is due."""
        if self.graphs is not None:
            self.graphs.clear()

    @property
    def is_steady(self) -> bool:
        """Whether all passes to come compute alike: no codes are fitted any more."""
        return not isinstance(self.memory, ActivationMode) or self.memory.calibration.is_settled

    def as_fitted(self) -> AbstractContextManager[None]:
        """Fits codes to nothing further within."""
        return self.memory.calibration.paused() if isinstance(self.memory, ActivationMode) else nullcontext()

    @property
    def fitted(self) -> dict[str, Tensor]:
        """{layer: the codebook or the channels of its codes}."""
        return self.memory.calibration.fitted() if isinstance(self.memory, ActivationMode) else {}

    def autocast(self):
        return torch.autocast(self.device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext()

    def normalised(self, images: AnyBatch) -> AnyBatch:
        """Returns images normalised, those in uint8 in float32."""
        if isinstance(images, Tensor) and images.dtype == torch.uint8:
            return cast(AnyBatch, data.normalised(images, self.attached.backbone.image))
        return images

    def prepared(self, images: AnyBatch) -> AnyBatch:
        """Returns images as the model takes them: normalised, in its dtype, in the layout that convolutions hand on."""
        if isinstance(images, Features):
            return images
        return cast(AnyBatch, self.normalised(images).to(self.dtype, memory_format=self.layout))

    def logits(self, model: nn.Module, images: Batch) -> Tensor:
        """Returns [B, classes] in fp32; [heads, B, classes] with auxiliary heads in training."""
        with self.memory, self.autocast():
            return model(self.prepared(images)).float()

    def evaluated(self, model: nn.Module, images: Batch) -> Tensor:
        """Returns logits [B, classes] in fp32, of as many images at a time as in training: more could take more."""
        return torch.cat([self.logits(model, part) for part in images.split(self.optim.micro_batch or len(images))])

    def losses(self, model: nn.Module, images: Batch, targets: Tensor) -> Tensor:
        """Returns the mean loss over the batch of each head, [heads]."""
        return losses_of(self.logits(model, images), targets, self.criterion)

    def accumulate(
        self,
        model: nn.Module,
        images: Batch,
        targets: Tensor,
        share: float | Tensor = 1.0,
        after_forward: Callable[[], None] = lambda: None,
        around_backward: AbstractContextManager[None] = nullcontext(),
    ) -> Tensor:
        """Adds the gradient of one micro-batch, `share` of a batch, to what there is; returns its part of the loss."""
        learned: dict[int, Tensor] = {}  # number of an auxiliary head -> its loss

        def learn(heads: Sequence[int], logits: Tensor) -> None:
            with torch.autocast(self.device.type, enabled=False):  # as after the forward pass
                losses = losses_of(logits.float(), targets, self.criterion) * share
                self.scaler.scale(losses.sum()).backward()
            learned.update(zip(heads, losses.detach()))

        with self.attached.learning(learn):
            logits = self.logits(model, images)
        if logits.ndim == 3 and len(logits) - 1 == len(learned):
            logits = logits[:1]  # the model's own; the others' losses are known
        else:
            learned.clear()  # they are among these, some without a graph
        losses = losses_of(logits, targets, self.criterion) * share
        after_forward()
        with around_backward:
            self.scaler.scale(losses.sum()).backward()
        return torch.stack([*losses.detach(), *(learned[head] for head in sorted(learned))]).mean()

    def __call__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        images: Batch,
        targets: Tensor,
        after_forward: Callable[[], None] = lambda: None,
        of: int | None = None,
    ) -> Tensor:
        total, of = torch.zeros((), device=images.device), of or len(images)
        size = self.optim.micro_batch or len(images)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if self._sum is None or not self._sum.fits(trained):
            self._sum = GradientSum(trained)
        parts = list(zip(images.split(size), targets.split(size)))
        for number, (part, target) in enumerate(parts, 1):
            share = len(part) / of
            if (loss := self._replayed(model, part, target, share)) is None:
                summing = self._sum.last_backward() if number == len(parts) else nullcontext()
                loss = self.accumulate(model, part, target, share, after_forward, summing)
            total += loss
        if self.optim.clip_grad:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), self.optim.clip_grad)
        self._update(optimizer)
        self._release_gradients(optimizer, trained)
        return total

    def _update(self, optimizer: Optimizer) -> None:
        """Lets the optimiser take its step, and what acts behind it, where no gradient is infinite."""
        acts = self.attached.after_step
        scale = self.scaler.get_scale() if acts else 0.0
        self.scaler.step(optimizer)
        self.scaler.update()
        if acts and self.scaler.get_scale() >= scale:  # a step that is left out halves it
            for act in acts:
                act(optimizer)

    def _replayed(self, model: nn.Module, images: Batch, targets: Tensor, share: float) -> Tensor | None:
        """Returns the loss of a micro-batch whose pass was replayed as a graph; None where it has to run."""
        if self.graphs is None:
            return None

        run = functools.partial(self.accumulate, model)
        if ready := self._taken >= LAUNCHED and self.is_steady:
            for p in self.with_gradient:  # where the graph finds them again
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return self.graphs(run, images, targets, share, ready)

    def _release_gradients(self, optimizer: Optimizer, trained: list[nn.Parameter]) -> None:
        """Ends the gradients of a step; those that graphs add to stay, as zeros."""
        self._taken += 1
        self.with_gradient = [p for p in trained if p.grad is not None]
        optimizer.zero_grad(set_to_none=self.graphs is None or not self.graphs.is_active)
