"""The schema of a run: one dataclass a config group. `conf/` holds what differs from the defaults here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

from omegaconf import MISSING, OmegaConf

from s2a_cli.common.text import nearest
from s2a_cli.config.overrides import CONF
from s2a_cli.config.rules import NAME, PATH, number, numbers, one_of, pattern
from s2a_cli.config.settings import setting

GONE = ("quant=auto", "quant.budget_mib")  # what version 0.1.0 had where there is a budget now
SIZE = r"(\d+(?:\.\d+)?)(MiB|GiB)"  # of memory
DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")  # of DomainNet
OLDER_VALUES = {"dataset.cache": {"taps": "features"}}  # of version 0.1.0 -> as they are called now

AT_LEAST_1 = number("an integer of at least 1", lambda value: value >= 1)
POSITIVE = number("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = number("a number of at least 0", lambda value: value >= 0)
BELOW_1 = number("a number of at least 0, below 1", lambda value: 0 <= value < 1)
FROM_0_TO_1 = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
BITS = number("an integer from 1 to 8", lambda value: 1 <= value <= 8)
SHARE = number("a number above 0 and below 1", lambda value: 0 < value < 1)
# A Beta distribution of a smaller parameter draws nothing but 0 and 1, of a larger one nothing but 1/2.
MIX = number("0, or a number from 0.001 to 1000", lambda value: value == 0 or 1e-3 <= value <= 1e3)


@dataclass
class BackboneConfig:
    """Settings of the pretrained model; null takes what timm's pretrained_cfg says."""

    name: str = setting(help="the name in tables and paths", rule=NAME)
    timm: str = setting(help="timm's model name, with its tag", rule=pattern("a name of timm's", r"[\w.+-]{1,200}"))
    pretrained: bool = setting(True, help="false: random weights")
    checkpoint: str | None = setting(
        None, help="a file instead of the hub: .safetensors, .pth (weights only) or a ViT's .npz", rule=PATH
    )
    image_size: int | None = setting(
        None,
        help="pixels; this and the next four: null takes timm's pretrained_cfg",
        rule=number("an integer from 1 to 16384", lambda value: 1 <= value <= 16384),
    )
    mean: list[float] | None = setting(
        None,
        help="of the three colour channels, which lie in 0 to 1",
        rule=numbers(3, "3 numbers, one a colour channel"),
    )
    std: list[float] | None = setting(
        None,
        help="likewise",
        rule=numbers(3, "3 numbers above 0, one a colour channel", lambda *values: min(values) > 0),
    )
    interpolation: str | None = setting(
        None,
        help="nearest | bilinear | bicubic | lanczos",
        rule=one_of("nearest", "bilinear", "bicubic", "lanczos"),
    )
    crop_pct: float | None = setting(
        None,
        help="share of the resized test image's side that the centre crop keeps",
        rule=number("a number from 0.1 to 1", lambda value: 0.1 <= value <= 1),
    )
    lr_scale: float = setting(
        1.0, help="small backbones take larger learning rates: optim.lr is method.lr times this", rule=POSITIVE
    )
    weights: str = setting(
        "fp32",
        help="fp32 | bf16 | int8 | nf4: how frozen weights are stored | offload: on the host, brought block by block |"
        " auto: what suits a budget",
        rule=one_of("fp32", "bf16", "int8", "nf4", "offload", "auto"),
    )
    channels_last: bool = setting(
        False, help="true: maps lie channels last (NHWC): the same up to rounding, and ConvNets often faster"
    )
    kwargs: dict[str, Any] = setting({}, help="passed on to timm.create_model")


CODED = ("pointwise", "norm", "attention", "softmax")  # families of operators for which `bits` is the default
OF_BITS: Any = "${.bits}"  # a default that refers to `bits` of the same config


@dataclass
class QuantConfig:
    """Settings of what is kept for the backward pass: bits an element, and what is computed again.

    A family of operators without bits (null) keeps what PyTorch itself keeps. In Python, `QuantConfig(bits=4)` makes
    one from its settings, and `QuantConfig.named("tiny")` one of those that `s2a ls quants` lists.
    """

    name: str = setting(help="the name in tables", rule=NAME)
    lossless: bool = setting(
        True,
        help="keep less where the gradient stays as it is: ReLU and dropout 1 bit, frozen convolutions nothing, ...",
    )
    bits: int | None = setting(None, help="the default of the four families below", rule=BITS)
    pointwise: int | None = setting(
        OF_BITS, help="GELU, SiLU, hardswish, sigmoid, ...: a code of the derivative", rule=BITS
    )
    norm: int | None = setting(OF_BITS, help="LayerNorm, GroupNorm, RMSNorm: the normalised input", rule=BITS)
    attention: int | None = setting(OF_BITS, help="fused attention: q, k and v", rule=BITS)
    softmax: int | None = setting(OF_BITS, help="unfused attention: the map", rule=BITS)
    linear: int | None = setting(None, help="input of trainable Linear and Conv layers; opt-in", rule=BITS)
    group: int = setting(64, help="elements that share one scale (norm, attention, softmax, linear)", rule=AT_LEAST_1)
    rounding: str = setting(
        "nearest", help="nearest | stochastic: unbiased, and noisier", rule=one_of("nearest", "stochastic")
    )
    calibrate: bool = setting(True, help="codebooks from each layer's own first batch; false: fixed ones")
    recompute: str = setting(
        "none",
        help="none | block: keep only the input of each block, compute the block again in the backward pass",
        rule=one_of("none", "block"),
    )
    input: int | None = setting(
        None,
        help="bits of that input: 1 to 8, 16 for bfloat16; null: as it is",
        rule=number("an integer from 1 to 8, or 16 for bfloat16", lambda value: 1 <= value <= 8 or value == 16),
    )
    chunks: int | None = setting(
        1,
        help="batch chunks in which a block runs: smaller temporaries, more launches; null: as pays on the device",
        rule=AT_LEAST_1,
    )
    blocks: dict[int, Any] = setting({}, help="settings of single blocks, by number from 0: {3: {norm: 8}}")

    def __post_init__(self) -> None:
        for name in CODED:
            if getattr(self, name) == OF_BITS:
                setattr(self, name, self.bits)

    @classmethod
    def unresolved(cls) -> QuantConfig:
        """Returns the defaults with the reference to `bits` left to OmegaConf."""
        made = cls()
        for name in CODED:
            setattr(made, name, OF_BITS)
        return made

    @classmethod
    def named(cls, name: str, **settings: Any) -> QuantConfig:
        """Returns the settings that a name such as "tiny" stands for on the command line, with these changes.

        Raises ValueError for another name, for "auto", which measures a model first, and for unknown settings.
        """
        known = [path.stem for path in sorted((CONF / "quant").glob("*.yaml")) if path.stem != "auto"]
        if name not in known:
            raise ValueError(f"quant={name!r}: expected one of {', '.join(known)}{nearest(str(name), known)}")
        stored = OmegaConf.to_container(OmegaConf.load(CONF / "quant" / f"{name}.yaml"))
        return cls(**cast(dict[str, Any], stored)).changed(**settings)

    def changed(self, **settings: Any) -> QuantConfig:
        """Returns these settings with changes. Raises ValueError for those that there are not."""
        names = [field.name for field in fields(self)]
        if odd := next((name for name in settings if name not in names), None):
            raise ValueError(f"{odd}: no such setting; accepted: {', '.join(names)}{nearest(odd, names)}")
        if "bits" in settings:  # of those families that follow it
            settings = {name: settings["bits"] for name in CODED if getattr(self, name) == self.bits} | settings
        return replace(self, **settings)

    @property
    def is_reference(self) -> bool:
        """Whether exactly what PyTorch itself keeps is kept, by one pass over the batch."""
        coded = self.lossless or any(getattr(self, name) is not None for name in (*CODED, "linear"))
        return not coded and self.recompute == "none" and self.chunks == 1 and not self.blocks

    def of_block(self, number: int) -> QuantConfig:
        """Returns the settings of one block: these, changed by what `blocks` says about it."""
        return self.changed(**self.blocks.get(number, {}))


@dataclass
class DatasetConfig:
    """Settings of the images, their splits and their augmentation."""

    name: str = setting(help="the name in tables and paths")
    root: str | None = setting(None, help="where the data is or goes; null: $S2A_DATA or ~/.cache/s2a", rule=PATH)
    download: bool = setting(True, help="false: only what lies under root")
    file: str | None = setting(
        None,
        help="table: a .csv, .tsv or .parquet file with a line for each image; root is its folder by default",
        rule=PATH,
    )
    image_column: str | None = setting(None, help="table: the column of paths, relative to root; null finds it")
    label_column: str | None = setting(None, help="table: the column of labels; null finds it")
    class_columns: list[str] | None = setting(None, help="table: columns of 0 and 1, one a class; null finds them")
    split_column: str | None = setting(None, help="table: the column of train, val and test; null finds it")
    separator: str | None = setting(None, help="table: what stands between the labels of an image that has several")
    multi_label: bool | None = setting(
        None, help="table: whether an image can have several labels, or none; null: what the labels look like"
    )
    test_root: str | None = setting(
        None, help="folder: class folders elsewhere, of which all images are test", rule=PATH
    )
    hold_out: str | None = setting(
        None,
        help="images of one animal or place stay in one split: a column; folder: parent, or an expression for paths",
    )
    domain: str | None = setting(
        None,
        help="domainnet: clipart | infograph | painting | quickdraw | real | sketch; folder: one below root, null: all"
        " but test_domain",
    )
    test_domain: str | None = setting(None, help="test on another domain than trained on")
    shots: int | None = setting(None, help="training images a class", rule=AT_LEAST_1)
    fraction: float | None = setting(
        None,
        help="of the training images, class-balanced",
        rule=number("a number above 0, at most 1", lambda value: 0 < value <= 1),
    )
    val_fraction: float = setting(0.2, help="of train, where there is no official validation split", rule=SHARE)
    test_fraction: float = setting(0.2, help="of images without a test split", rule=SHARE)
    split_seed: int = setting(
        0, help="seeds the splits, shots and fraction; independent of the run's seed", rule=NOT_NEGATIVE
    )
    on_corrupt: str = setting("stop", help="stop | skip: what a damaged image does", rule=one_of("stop", "skip"))
    layout: str | None = setting(
        None,
        help="splits | classes | domains: what the folders below root are; null: what their names say",
        rule=one_of("splits", "classes", "domains"),
    )
    scale: list[float] | None = setting(
        [0.5, 1.0],
        help="random crop, share of the area; null: none",
        rule=numbers(2, "2 numbers, 0 < smallest <= largest <= 1", lambda low, high: 0 < low <= high <= 1),
    )
    hflip: float = setting(0.5, help="probability of a mirrored training image", rule=FROM_0_TO_1)
    cache: str | None = setting(
        None,
        help="features: keep on disk what linear, side and method.blocks=last:K read of the rest; auto: as planned",
        rule=one_of("features", "auto"),
    )


@dataclass
class OptimConfig:
    """Settings of the optimiser, its schedule and its batches."""

    name: str = setting("adamw", help="adamw | sgd", rule=one_of("adamw", "sgd"))
    lr: float = setting(
        "${times:${method.lr},${backbone.lr_scale}}",
        help="method.lr times backbone.lr_scale by default",
        rule=POSITIVE,
    )
    head_lr: float | None = setting(
        None,
        help="of the new head, which may need a higher one than pretrained weights; optim.lr by default",
        rule=POSITIVE,
    )
    weight_decay: float = setting(1e-4, help="never on biases, norms and prompts", rule=NOT_NEGATIVE)
    momentum: float = setting(
        0.9, help="sgd; memory: one value a trainable parameter, with 0 none (adamw: two)", rule=BELOW_1
    )
    epochs: int = setting(10, help="passes over the training images", rule=AT_LEAST_1)
    warmup_epochs: float = setting(0.5, help="the learning rate rises from 0; must be below epochs", rule=NOT_NEGATIVE)
    schedule: str = setting(
        "cosine",
        help="cosine | constant: the learning rate after warm-up",
        rule=one_of("cosine", "constant"),
    )
    batch_size: int = setting(64, help="images an optimiser step; memory: less reduces it", rule=AT_LEAST_1)
    micro_batch: int | None = setting(
        None,
        help="images a forward pass; gradients accumulate up to batch_size; memory: a smaller number reduces it",
        rule=AT_LEAST_1,
    )
    label_smoothing: float = setting(
        0.0,
        help="share of the target that all classes divide; with several labels an image, that 0 and 1 do",
        rule=BELOW_1,
    )
    balance: str = setting(
        "none",
        help="none | weights | sampler: rare classes count as much as others, in the loss or by how often they come",
        rule=one_of("none", "weights", "sampler"),
    )
    clip_grad: float | None = setting(None, help="the gradient's greatest global norm", rule=POSITIVE)
    mixup: float = setting(0.0, help="alpha of the Beta distribution; 0: off", rule=MIX)
    cutmix: float = setting(0.0, help="likewise; with both on, one of them for each batch", rule=MIX)


@dataclass
class MethodConfig:
    """Settings that every method has beside those of its structures."""

    name: str = setting(help="the name in tables and paths")
    lr: float = setting(help="the default of optim.lr", rule=POSITIVE)


@dataclass
class RunConfig:
    """All settings of one run. `method` is replaced by the config of a structure, or by one made of several."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    method: Any = MISSING
    quant: QuantConfig = field(default_factory=QuantConfig.unresolved)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = setting(
        0,
        help="same seed, same machine: same numbers",
        rule=number("an integer from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32),
    )
    precision: str = setting(
        "fp32",
        help="fp32 | tf32 (CUDA: fp32 matmuls in 19 bits) | amp-bf16 | amp-fp16 | bf16;"
        " memory: the 16-bit ones reduce it",
        rule=one_of("fp32", "tf32", "amp-bf16", "amp-fp16", "bf16"),
    )
    device: str = setting(
        "auto",
        help="auto | cpu | cuda | cuda:N | mps",
        rule=pattern("auto, cpu, cuda, cuda:N or mps", r"auto|cpu|mps|cuda(:[0-9]{1,3})?"),
    )
    budget: str | None = setting(
        None,
        help="memory that a step may take, as 6GiB: micro-batches, recomputation and codes are chosen for speed",
        rule=pattern("a size above 0 in MiB or GiB, such as 6GiB", rf"(?=.*[1-9].*[MG]iB){SIZE}"),
    )
    fidelity: str = setting(
        "exact",
        help="exact | 0.999 | 0.99: with a budget, the least cosine of the gradient with the exact one",
        rule=one_of("exact", "0.999", "0.99"),
    )
    busy: str = setting(
        "refuse",
        help="refuse | allow: a CUDA device that other processes use; beside them, the peak stays predicted",
        rule=one_of("refuse", "allow"),
    )
    compile: bool = setting(False, help="torch.compile: minutes at the start, faster steps")
    cuda_graphs: bool | None = setting(
        None,
        help="true: replay each pass as one CUDA graph, faster where the host limits the device; null: with a budget",
    )
    profile: str | None = setting(
        None,
        help="memory: also write PyTorch's record of all allocations to the run's folder; needs CUDA",
        rule=one_of("memory"),
    )
    compile_budget: float | None = setting(
        None,
        help="with compile, the compiler's activation_memory_budget: 0 recomputes all, 1 nothing",
        rule=FROM_0_TO_1,
    )
    workers: int | None = setting(
        None,
        help="processes that load images; null chooses",
        rule=number("an integer from 0 to 1024", lambda value: 0 <= value <= 1024),
    )
    test: bool = setting(True, help="false: leave the test split alone; for a search")
    tensorboard: bool = setting(False, help="also write TensorBoard files to the run's folder")
    run_dir: str | None = setting(None, help="null: runs/<dataset>/<backbone>/<method>/<id>", rule=PATH)
    save_minutes: float = setting(
        5.0,
        help="between the states from which a broken run goes on; one is saved after each epoch anyway",
        rule=POSITIVE,
    )
    save_steps: int | None = setting(None, help="also after this many steps", rule=AT_LEAST_1)


@dataclass
class SweepConfig:
    """Settings of how `s2a sweep` goes through a grid. An experiment can bring the grid and its exclusions along."""

    grid: dict[str, Any] = setting({}, help="key -> its values, as on the command line, where they can be replaced")
    exclude: list[dict[str, Any]] = setting([], help="[{method: linear, quant: [int4, tiny], why: a reason}]")
    dir: str = setting("runs", help="the runs lie in DIR/<dataset>/<backbone>/<method>/<id>", rule=PATH)
    workers: int | None = setting(None, help="runs at a time; null: one for each GPU, or one", rule=AT_LEAST_1)
    pack: bool = setting(
        False, help="as many runs on a GPU as fit by what they are predicted to need; measured peaks are then not taken"
    )
    report: str | None = setting(None, help="an HTML file that `s2a report` writes of all runs at the end", rule=PATH)
    launcher: str = setting("local", help="local | slurm | ray", rule=one_of("local", "slurm", "ray"))
    slurm: dict[str, Any] = setting(
        {}, help="submitit's: {partition: gpu, timeout_min: 240}; cluster: local imitates it"
    )
