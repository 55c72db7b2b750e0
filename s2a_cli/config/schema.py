"""The schema of a run: one dataclass a config group. `conf/` holds the values, this file their types and their checks.

The comment behind a field is its line in `s2a train --help`.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from s2a_cli.common.errors import nearest
from s2a_cli.config.rules import NAME, PATH, Rule, number, numbers, one_of, pattern, show


@dataclass
class BackboneConfig:
    name: str = MISSING  # the name in tables and paths
    timm: str = MISSING  # timm's model name, with its tag
    pretrained: bool = True  # false: random weights
    checkpoint: str | None = None  # a file instead of the hub: .safetensors, .pth (weights only) or a ViT's .npz
    image_size: int | None = None  # pixels; this and the next four: null takes timm's pretrained_cfg
    mean: list[float] | None = None  # of the three colour channels, which lie in 0 to 1
    std: list[float] | None = None  # likewise
    interpolation: str | None = None  # nearest | bilinear | bicubic | lanczos
    crop_pct: float | None = None  # share of the resized test image's side that the centre crop keeps
    lr_scale: float = 1.0  # small backbones take larger learning rates: optim.lr is method.lr times this
    weights: str = "fp32"  # fp32 | bf16 | int8 | nf4: how frozen weights are stored; they are unpacked layer by layer
    kwargs: dict[str, Any] = field(default_factory=dict)  # passed on to timm.create_model


CODED = ("pointwise", "norm", "attention", "softmax")  # families of operators for which `bits` is the default
OF_BITS: Any = "${.bits}"  # the default of a field: as `bits` of the same config says


@dataclass
class QuantConfig:
    """What is kept for the backward pass: bits an element (null: what stock PyTorch keeps), and what is computed
    again.
    """

    name: str = MISSING  # the name in tables
    lossless: bool = (
        True  # keep less where the gradient stays as it is: ReLU and dropout 1 bit, frozen convolutions nothing, ...
    )
    bits: int | None = None  # the default of the four families below
    pointwise: int | None = OF_BITS  # GELU, SiLU, hardswish, sigmoid, ...: a code of the derivative
    norm: int | None = OF_BITS  # LayerNorm, GroupNorm, RMSNorm: the normalised input
    attention: int | None = OF_BITS  # fused attention: q, k and v
    softmax: int | None = OF_BITS  # unfused attention: the map
    linear: int | None = None  # input of trainable Linear and Conv layers; opt-in
    group: int = 64  # elements that share one scale (norm, attention, softmax, linear)
    rounding: str = "nearest"  # nearest | stochastic: unbiased, and noisier
    calibrate: bool = True  # levels from each layer's own first batch; false: fixed tables
    recompute: str = (
        "none"  # none | block: keep only the input of each block, compute the block again in the backward pass
    )
    input: int | None = None  # bits of that input: 1 to 8, 16 for bfloat16; null: as it is
    chunks: int | None = (
        1  # pieces of the batch in which a block runs: smaller temporaries, more launches; null: as pays on the device
    )
    blocks: dict[int, Any] = field(default_factory=dict)  # settings of single blocks, by number from 0: {3: {norm: 8}}
    budget_mib: float | None = None  # quant=auto: the peak that these settings are chosen for

    def __post_init__(self) -> None:
        for name in CODED:
            if getattr(self, name) == OF_BITS:
                setattr(self, name, self.bits)

    @classmethod
    def unresolved(cls) -> QuantConfig:
        """The defaults with the reference to `bits` left to OmegaConf."""
        made = cls()
        for name in CODED:
            setattr(made, name, OF_BITS)
        return made

    @property
    def is_stock(self) -> bool:
        """Whether exactly what stock PyTorch keeps is kept, by one pass over the batch."""
        coded = self.lossless or any(getattr(self, name) is not None for name in (*CODED, "linear"))
        return not coded and self.recompute == "none" and self.chunks == 1 and not self.blocks

    def of_block(self, number: int) -> QuantConfig:
        """The settings of one block: these, with what `blocks` says of it."""
        own = dict(self.blocks.get(number, {}))
        if "bits" in own:
            own = {name: own["bits"] for name in CODED if getattr(self, name) == self.bits} | own
        return replace(self, **own)


@dataclass
class DatasetConfig:
    name: str = MISSING  # the name in tables and paths
    root: str | None = None  # where the data is or goes; null: $S2A_DATA or ~/.cache/s2a
    download: bool = True  # false: only what lies under root
    domain: str | None = None  # domainnet: real | clipart | infograph | painting | quickdraw | sketch
    test_domain: str | None = None  # domainnet: test on another domain than trained on
    shots: int | None = None  # training images a class
    fraction: float | None = None  # of the training images, class-balanced
    val_fraction: float = 0.2  # of train, where there is no official validation split
    test_fraction: float = 0.2  # of a folder that is one tree
    split_seed: int = 0  # seeds the splits, shots and fraction; independent of the run's seed
    on_corrupt: str = "stop"  # stop | skip: what a damaged image does
    layout: str | None = None  # splits | classes: what the folders below root are; null: what their names say
    scale: list[float] | None = field(default_factory=lambda: [0.5, 1.0])  # random crop, share of the area; null: none
    hflip: float = 0.5  # probability of a mirrored training image
    cache: str | None = (
        None  # taps: what linear and side read of the backbone, once for each image and its mirror image, on disk
    )


@dataclass
class OptimConfig:
    name: str = "adamw"  # adamw | sgd
    lr: float = MISSING  # method.lr times backbone.lr_scale by default
    head_lr: float | None = (
        None  # of the new head, which may need a higher one than pretrained weights; optim.lr by default
    )
    weight_decay: float = 1e-4  # never on biases, norms and prompts
    momentum: float = 0.9  # sgd
    epochs: int = 10  # passes over the training images
    warmup_epochs: float = 0.5  # the learning rate rises from 0; must be below epochs
    schedule: str = "cosine"  # cosine | constant: the learning rate after warm-up
    batch_size: int = 64  # images an optimiser step
    micro_batch: int | None = None  # images a forward pass; gradients accumulate up to batch_size
    label_smoothing: float = 0.0  # share of the target that all classes divide
    clip_grad: float | None = None  # the gradient's greatest global norm
    mixup: float = 0.0  # alpha of the Beta distribution; 0: off
    cutmix: float = 0.0  # likewise; with both on, one of them for each batch


@dataclass
class RunConfig:
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    method: Any = MISSING  # the Config of the method's own file in s2a_cli/methods/
    quant: QuantConfig = field(default_factory=QuantConfig.unresolved)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0  # same seed, same machine: same numbers
    precision: str = "fp32"  # fp32 | tf32 (CUDA: products of fp32 in 19 bits) | amp-bf16 | amp-fp16 | bf16
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    busy: str = (
        "refuse"  # refuse | allow: a CUDA device that other processes use; beside them, the peak stays predicted
    )
    compile: bool = False  # torch.compile: minutes at the start, faster steps
    profile: str | None = None  # memory: also write PyTorch's record of all allocations to the run's folder; needs CUDA
    compile_budget: float | None = (
        None  # with compile, the compiler's activation_memory_budget: 0 recomputes all, 1 nothing
    )
    workers: int | None = None  # processes that load images; null chooses
    test: bool = True  # false: leave the test split alone; for a search
    tensorboard: bool = False  # also write TensorBoard files to the run's folder
    run_dir: str | None = None  # null: runs/<dataset>/<backbone>/<method>/<id>
    save_minutes: float = (
        5.0  # between the states from which a broken run goes on; one is saved after each epoch anyway
    )
    save_steps: int | None = None  # also after this many steps


@dataclass
class SweepConfig:
    """How `s2a sweep` goes through a grid. An experiment can bring the grid and its exclusions along."""

    grid: dict[str, Any] = field(
        default_factory=dict
    )  # key -> its values, as on the command line, where they can be replaced
    exclude: list[dict[str, Any]] = field(
        default_factory=list
    )  # [{method: linear, quant: [int4, tiny], why: a reason}]
    dir: str = "runs"  # the runs lie in DIR/<dataset>/<backbone>/<method>/<id>
    workers: int | None = None  # runs at a time; null: one for each GPU, or one
    pack: bool = False  # as many runs on a GPU as fit by their predicted peaks; measured peaks are then not taken
    report: str | None = None  # an HTML file that `s2a report` writes of all runs at the end
    launcher: str = "local"  # local | slurm | ray
    slurm: dict[str, Any] = field(
        default_factory=dict
    )  # submitit's: {partition: gpu, timeout_min: 240}; cluster: local imitates it


DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")  # of DomainNet


AT_LEAST_1 = number("an integer of at least 1", lambda value: value >= 1)
POSITIVE = number("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = number("a number of at least 0", lambda value: value >= 0)
MIX = number(
    "0, or a number from 0.001 to 1000", lambda value: value == 0 or 1e-3 <= value <= 1e3
)  # else the draws degenerate
BITS = number("an integer from 1 to 8", lambda value: 1 <= value <= 8)
SHARE = number("a number above 0 and below 1", lambda value: 0 < value < 1)

RULES = {  # a key, or a pattern that matches keys
    "backbone.name": NAME,
    "backbone.timm": pattern("a name of timm's", r"[\w.+-]{1,200}"),
    "backbone.checkpoint": PATH,
    "backbone.image_size": number("an integer from 1 to 16384", lambda value: 1 <= value <= 16384),
    "backbone.mean": numbers(3, "3 numbers, one a colour channel"),
    "backbone.std": numbers(3, "3 numbers above 0, one a colour channel", lambda *values: min(values) > 0),
    "backbone.interpolation": one_of("nearest", "bilinear", "bicubic", "lanczos"),
    "backbone.lr_scale": POSITIVE,
    "backbone.weights": one_of("fp32", "bf16", "int8", "nf4"),
    "backbone.crop_pct": number("a number from 0.1 to 1", lambda value: 0.1 <= value <= 1),
    "method*.lr": POSITIVE,
    "method*.blocks": pattern("all or last:K with K of at least 1", r"all|last:0{0,3}[1-9][0-9]{0,3}"),
    "method*.rank": AT_LEAST_1,
    "method*.heads": AT_LEAST_1,
    "method*.width": AT_LEAST_1,
    "method*.grid": AT_LEAST_1,
    "method*.lr_scale": POSITIVE,
    "method*.segments": AT_LEAST_1,
    "quant.name": NAME,
    "quant.bits": BITS,
    "quant.pointwise": BITS,
    "quant.norm": BITS,
    "quant.attention": BITS,
    "quant.softmax": BITS,
    "quant.linear": BITS,
    "quant.group": AT_LEAST_1,
    "quant.rounding": one_of("nearest", "stochastic"),
    "quant.recompute": one_of("none", "block"),
    "quant.input": number("an integer from 1 to 8, or 16 for bfloat16", lambda value: 1 <= value <= 8 or value == 16),
    "quant.chunks": AT_LEAST_1,
    "quant.budget_mib": POSITIVE,
    "dataset.root": PATH,
    "dataset.domain": one_of(*DOMAINS),
    "dataset.test_domain": one_of(*DOMAINS),
    "dataset.shots": AT_LEAST_1,
    "dataset.fraction": number("a number above 0, at most 1", lambda value: 0 < value <= 1),
    "dataset.val_fraction": SHARE,
    "dataset.test_fraction": SHARE,
    "dataset.split_seed": NOT_NEGATIVE,
    "dataset.on_corrupt": one_of("stop", "skip"),
    "dataset.layout": one_of("splits", "classes"),
    "dataset.scale": numbers(2, "2 numbers, 0 < smallest <= largest <= 1", lambda low, high: 0 < low <= high <= 1),
    "dataset.cache": one_of("taps"),
    "dataset.hflip": number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "optim.name": one_of("adamw", "sgd"),
    "optim.lr": POSITIVE,
    "optim.head_lr": POSITIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.momentum": number("a number of at least 0, below 1", lambda value: 0 <= value < 1),
    "optim.epochs": AT_LEAST_1,
    "optim.warmup_epochs": NOT_NEGATIVE,
    "optim.schedule": one_of("cosine", "constant"),
    "optim.batch_size": AT_LEAST_1,
    "optim.micro_batch": AT_LEAST_1,
    "optim.label_smoothing": number("a number of at least 0, below 1", lambda value: 0 <= value < 1),
    "optim.clip_grad": POSITIVE,
    "optim.mixup": MIX,
    "optim.cutmix": MIX,
    "seed": number("an integer from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32),
    "compile_budget": number("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "precision": one_of("fp32", "tf32", "amp-bf16", "amp-fp16", "bf16"),
    "device": pattern("auto, cpu, cuda, cuda:N or mps", r"auto|cpu|mps|cuda(:[0-9]{1,3})?"),
    "busy": one_of("refuse", "allow"),
    "profile": one_of("memory"),
    "workers": number("an integer from 0 to 1024", lambda value: 0 <= value <= 1024),
    "run_dir": PATH,
    "sweep.dir": PATH,
    "sweep.report": PATH,
    "sweep.workers": AT_LEAST_1,
    "sweep.launcher": one_of("local", "slurm", "ray"),
    "save_minutes": POSITIVE,
    "save_steps": AT_LEAST_1,
}


def meanings(schema: type) -> dict[str, str]:
    """{field: the comment behind it} of a dataclass and those it inherits from."""
    sources = [inspect.getsource(cls) for cls in reversed(schema.__mro__) if is_dataclass(cls)]
    return dict(re.findall(r"^\s+(\w+): .*?  # (.*)$", "\n".join(sources), re.MULTILINE))


def rule_of(key: str) -> Rule | None:
    return next((rule for pattern, rule in RULES.items() if fnmatchcase(key, pattern)), None)


def leaves(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting, null for one without a value; lists and `kwargs` as plain Python."""
    for key in config:
        value = None if OmegaConf.is_missing(config, key) else config[key]
        if isinstance(value, DictConfig) and OmegaConf.get_type(value) is not dict:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def members(schema: type, key: str) -> tuple[Any, ...]:
    """The types that a field of a dataclass takes: (int, NoneType) for `int | None`."""
    hint = typing.get_type_hints(schema)[key]
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def check(config: DictConfig) -> dict[str, str]:
    """Problems of the values in a config that fits the schema: {key: one line}.

    What needs the backbone or the data (a rank above the width, a missing folder) is checked where they are loaded.
    """
    values = dict(leaves(config))
    problems = {}
    for key, value in values.items():
        rule = rule_of(key)
        if rule and value is not None and not rule.test(value):
            node, _, name = key.rpartition(".")
            schema = OmegaConf.get_type(OmegaConf.select(config, node) if node else config)
            problems[key] = rule.problem(key, value, optional=type(None) in members(schema, name))

    def both(*keys: str) -> bool:
        return all(values.get(key) is not None and key not in problems for key in keys)

    batch, micro, epochs, warmup = (f"optim.{k}" for k in ("batch_size", "micro_batch", "epochs", "warmup_epochs"))
    if both(micro, batch) and values[micro] > values[batch]:
        problems[micro] = f"{micro}={values[micro]}: expected at most {batch}={values[batch]}"
    if both(warmup, epochs) and values[warmup] >= values[epochs]:
        problems[warmup] = f"{warmup}={values[warmup]}: expected less than {epochs}={values[epochs]}"
    problems |= _check_blocks(values.get("quant.blocks") or {})
    if both("dataset.cache"):
        problems |= _check_cache(values)
    if values.get("quant.name") == "auto" and values.get("quant.budget_mib") is None:
        problems["quant.budget_mib"] = "quant=auto needs quant.budget_mib=N, the peak in MiB that a step may reach"
    if both("compile_budget") and not values.get("compile"):
        problems["compile_budget"] = (
            f"compile_budget={values['compile_budget']} is the compiler's: set compile=true too"
        )
    if both("quant.input") and values.get("quant.recompute") == "none":
        problems["quant.input"] = (
            f"quant.input={values['quant.input']} is of recomputed blocks: set quant.recompute=block too"
        )
    if (
        values.get("compile")
        and not any(key.startswith("quant.") for key in problems)
        and not OmegaConf.to_object(config.quant).is_stock
    ):
        problems["compile"] = (
            f"compile=true needs quant=none, not {values['quant.name']}: codes and recomputation break the compiler's"
            " graph at every operator (ViT-Ti with int4: 60 graphs, and on two CPU cores 1.13 times the time of a step"
            " without it)"
        )
    if both("dataset.shots", "dataset.fraction"):
        problems["dataset.fraction"] = "dataset.shots and dataset.fraction exclude each other: set one to null"
    if both("dataset.test_domain") and values.get("dataset.domain") is None:
        problems["dataset.test_domain"] = "dataset.test_domain is set without dataset.domain, the domain to train on"
    return problems


def check_quant(quant: QuantConfig) -> list[str]:
    """Problems of settings that were made in Python: one line each."""
    settings = {f.name: getattr(quant, f.name) for f in fields(quant) if f.name != "blocks"}
    found = [_quant_problem(name, name, value) for name, value in settings.items() if name != "name"]
    found += list(_check_blocks(quant.blocks).values())
    if quant.input is not None and quant.recompute == "none":
        found.append(f"input={quant.input} is of recomputed blocks: set recompute='block' too")
    return [problem for problem in found if problem]


def _quant_problem(key: str, name: str, value: Any) -> str:
    """What is wrong with a value of QuantConfig; empty where nothing is."""
    rule, kinds = RULES.get(f"quant.{name}"), members(QuantConfig, name)
    number = float in kinds and type(value) is int
    if (type(value) in kinds or number) and not (rule and value is not None and not rule.test(value)):
        return ""
    accepted = rule.accepted if rule else "true or false"
    return f"{key}={show(value)}: expected {accepted}" + (", or null" if type(None) in kinds else "")


def _check_cache(values: dict[str, Any]) -> dict[str, str]:
    """Problems of dataset.cache; whether the method has a part that trains alone is checked where it is attached."""
    key = "dataset.cache"
    for other, value, why in (
        ("dataset.scale", None, "each random crop would need another forward pass of the backbone"),
        ("optim.mixup", 0.0, "each mixed image would need another forward pass of the backbone"),
        ("optim.cutmix", 0.0, "each mixed image would need another forward pass of the backbone"),
        ("compile", False, "the part that is trained is too small to compile"),
        ("quant.budget_mib", None, "quant=auto chooses settings of blocks, which do not run"),
    ):
        if values.get(other) != value:
            return {key: f"{key}={values[key]} needs {other}={show(value)}: {why}"}
    return {}


def _check_blocks(blocks: dict[int, Any]) -> dict[str, str]:
    """Problems of quant.blocks; whether the backbone has as many blocks is checked where it is made."""
    own = [
        f.name for f in fields(QuantConfig) if f.name not in ("name", "calibrate", "rounding", "blocks", "budget_mib")
    ]
    for block, settings in blocks.items():
        if not isinstance(settings, dict) or isinstance(block, bool):
            return {
                "quant.blocks": (
                    f"quant.blocks={show(blocks)}: expected settings for each number, such as {{3: {{norm: 8}}}}"
                )
            }
        for name, value in settings.items():
            key = f"quant.blocks.{block}.{name}"
            if name not in own:
                return {key: f"{key}: expected one of {', '.join(own)}{nearest(str(name), own)}"}
            if problem := _quant_problem(key, name, value):
                return {key: problem}
    return {}
