"""The schema of a run: one dataclass a config group. `conf/` holds the values, this file their types and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class BackboneConfig:
    name: str = MISSING  # the name in tables and paths
    timm: str = MISSING  # timm's model name, with its tag
    pretrained: bool = True  # False: random weights
    checkpoint: str | None = None  # a file instead of the hub: .safetensors, .pth (weights only) or a ViT's .npz
    image_size: int | None = None  # pixels; this and the next four: null takes timm's pretrained_cfg
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)  # passed on to timm.create_model


@dataclass
class QuantConfig:
    """Bits kept an element for the backward pass; null keeps what stock PyTorch keeps."""

    name: str = MISSING
    bits: int | None = None  # the default of the four families below
    pointwise: int | None = None  # GELU, SiLU, hardswish, sigmoid, ...: a code of the derivative
    norm: int | None = None  # LayerNorm, GroupNorm, RMSNorm: the normalised input
    attention: int | None = None  # fused attention: q, k and v
    softmax: int | None = None  # unfused attention: the map
    linear: int | None = None  # input of trainable Linear and Conv layers; opt-in
    group: int = 64  # elements that share one scale (norm, attention, softmax, linear)


@dataclass
class DatasetConfig:
    name: str = MISSING
    root: str | None = None  # where the data is or goes; null: $S2A_DATA or ~/.cache/s2a
    download: bool = True
    domain: str | None = None  # domainnet
    test_domain: str | None = None  # domainnet: test on another domain than trained on
    shots: int | None = None  # training images a class
    fraction: float | None = None  # of the training images, class-balanced
    val_fraction: float = 0.2  # of train, where there is no official validation split
    test_fraction: float = 0.2  # of a folder that is one tree
    split_seed: int = 0  # seeds the splits, shots and fraction; independent of the run's seed
    on_corrupt: str = "stop"  # stop | skip
    scale: list[float] | None = field(default_factory=lambda: [0.5, 1.0])  # random resized crop, share of the area; null: none
    hflip: float = 0.5  # probability


@dataclass
class OptimConfig:
    name: str = "adamw"  # adamw | sgd
    lr: float = MISSING  # conf/optim: ${method.lr}
    weight_decay: float = 1e-4  # never on biases, norms and prompts
    momentum: float = 0.9  # sgd
    epochs: int = 10
    warmup_epochs: float = 1.0
    schedule: str = "cosine"  # cosine | constant
    batch_size: int = 64
    micro_batch: int | None = None  # images a forward pass; gradients accumulate up to batch_size
    label_smoothing: float = 0.0
    clip_grad: float | None = None  # global norm
    mixup: float = 0.0
    cutmix: float = 0.0


@dataclass
class RunConfig:
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    method: Any = MISSING  # the Config of the method's own file in s2a_cli/methods/
    quant: QuantConfig = field(default_factory=QuantConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0
    precision: str = "fp32"  # fp32 | amp-bf16 | amp-fp16 | bf16
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    workers: int | None = None  # processes that load images; null chooses
    tensorboard: bool = False
    run_dir: str | None = None  # null: runs/<dataset>/<backbone>/<method>/<id>
