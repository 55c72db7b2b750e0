"""How close do gradients from codes come to exact ones? Real weights, real photos, bias tuning at 112 px.

    python benchmarks/fidelity/fidelity.py DATA [--out benchmarks] [--only presets grid families bias]

DATA: a folder with weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors,
weights/mobilenetv2_100.tf2_in1k_int8deq_same.safetensors, and the folders of class folders cifar10_subset/train,
flowers5/train, dtd6_textures/train, pacs/sketch/train. About 25 minutes on one core; set OMP_NUM_THREADS=1 for the same
bits. Prints and writes fidelity.md, fidelity.csv (a row a setting and state), fidelity_groups.csv (the presets, a row a
parameter group) and, where matplotlib is installed, fidelity.png. With --only, the other tables stay as they are there.

Two states. "start": pretrained weights, a random head of deviation 0.05, 64 photos, 16 of each of the four folders,
with random labels. "trained": after 16 steps of AdamW (2e-3, 64 photos each) on cifar10_subset, the gradient of 64
photos that were not trained on. Compared are the gradients of the backbone's biases (with `linear`, of all its
parameters): cosine and relative error (the norm of the difference over that of the exact gradient) of all together, and
of the worst group, which is one bias vector (one parameter).
"""

from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from s2a_cli.activations import compress_activations
from s2a_cli.activations.quant import codebooks
from s2a_cli.config.compose import CONF, compose
from s2a_cli.config.schema import QuantConfig
from s2a_cli.memory.predict import saved_bytes
from s2a_cli.training.step import train_mode

VIT = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
MOBILENET = "mobilenetv2_100.tf2_in1k_int8deq_same"
FOLDERS = ("cifar10_subset", "flowers5", "dtd6_textures", "pacs/sketch")
FAMILIES = ("pointwise", "norm", "attention", "softmax", "linear", "input")
CALIBRATED = ("pointwise", "norm", "softmax", "linear", "input")
BITS = (1, 2, 3, 4, 5, 6, 8)
DRAWS = (1, 3, 10, 30, 100)
Gradients = dict[str, Tensor]


@dataclass
class State:
    """A model at some point of its training, and the photos and labels whose gradient is asked for."""

    name: str
    model: Any  # timm's, whose attributes differ
    blocks: list[nn.Module]
    images: Tensor  # [B, 3, 112, 112]
    labels: Tensor  # [B]
    known: dict[bool, Gradients] = field(default_factory=dict)  # what exact() found

    def gradients(self, memory: AbstractContextManager, every: bool = False) -> Gradients:
        """Of the backbone's biases, or of all its parameters: {name: float64 [n]}."""
        tune(self.model, every)
        with memory:
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        found = {n: p.grad.double().flatten() for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return {name: grad for name, grad in found.items() if not is_head(name)}

    def exact(self, every: bool = False) -> Gradients:
        if every not in self.known:
            self.known[every] = self.gradients(nullcontext(), every)
        return self.known[every]

    def kept(self, memory: AbstractContextManager) -> int:
        """Bytes kept for the backward pass of bias tuning."""

        def run() -> Tensor:
            with memory:
                return self.model(self.images)

        tune(self.model)
        return saved_bytes(run, self.model)


@dataclass
class Row:
    table: str
    setting: str
    state: str
    bits: float | None  # bits an element of the coded tensors, scales included
    kept: float | None  # of what stock PyTorch keeps
    cosine: float
    error: float
    worst_cosine: float
    worst: str


def tune(model: nn.Module, every: bool = False) -> None:
    """Biases and head train, or everything; BatchNorms stay on their statistics."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(every or name.endswith("bias") or is_head(name))
    train_mode(model)


def is_head(name: str) -> bool:
    return name.startswith(("head", "classifier"))


def photos(files: list[Path]) -> Tensor:
    images = [Image.open(file).convert("RGB").resize((112, 112), Image.Resampling.BICUBIC) for file in files]
    return torch.stack([pil_to_tensor(image) for image in images]) / 127.5 - 1


def spread(folder: Path, count: int) -> list[Path]:
    """So many photos from all over a folder, always the same."""
    files = sorted(folder.glob("*/*"))
    return [files[i * len(files) // count] for i in range(count)]


def load(data: Path, name: str, file: str, **kwargs) -> Any:
    overlay = {"file": str(data / "weights" / f"{file}.safetensors"), "custom_load": False}
    model: Any = timm.create_model(name, pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay, **kwargs)
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(model.get_classifier().weight, std=0.05, generator=generator)
    return model


def states(data: Path) -> Iterator[State]:
    mixed = photos([file for folder in FOLDERS for file in spread(data / folder / "train", 16)])
    random = torch.randint(10, (64,), generator=torch.Generator().manual_seed(0))
    vit = load(data, VIT, VIT, img_size=112)
    yield State("start", vit, list(vit.blocks), mixed, random)
    files = spread(data / "cifar10_subset/train", 600)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0)).tolist()
    images, labels = photos([files[i] for i in order]), torch.tensor([i // 60 for i in order])
    trained = load(data, VIT, VIT, img_size=112)
    tune(trained)
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=2e-3)
    for step in range(16):
        part = slice(step % 8 * 64, step % 8 * 64 + 64)
        F.cross_entropy(trained(images[part]), labels[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    yield State("trained", trained, list(trained.blocks), images[512:576].clone(), labels[512:576])
    net = load(data, "mobilenetv2_100", MOBILENET, pad_type="same")
    yield State("MobileNetV2, start", net, [block for stage in net.blocks for block in stage], mixed, random)


def compare(found: Gradients, exact: Gradients) -> tuple[float, float, float, str]:
    """(cosine, relative error, the worst group's cosine, its name)."""
    a, b = torch.cat([found[name] for name in exact]), torch.cat(list(exact.values()))
    worst = min((F.cosine_similarity(found[name], exact[name], 0).item(), name) for name in exact)
    return F.cosine_similarity(a, b, 0).item(), ((a - b).norm() / b.norm()).item(), *worst


def quant(**settings) -> QuantConfig:
    recompute = "block" if "input" in settings else "none"
    return QuantConfig(name="fidelity", recompute=recompute, **settings)


def measured(table: str, setting: str, state: State, memory: AbstractContextManager, bits: float | None, **kw) -> Row:
    result = compare(state.gradients(memory, **kw), state.exact(**kw))
    row = Row(table, setting, state.name, bits, None, *result)
    print(f"{table}: {setting}, {state.name}: {row.cosine:.5f}, worst {row.worst_cosine:.4f} {row.worst}", flush=True)
    return row


def families(state: State) -> Iterator[Row]:
    """Each family alone, at each number of bits."""
    for family in FAMILIES:
        scale = {"pointwise": 0, "softmax": 16 / 50}.get(family, 16 / 64)  # a map's row: 50 keys
        for bits in BITS:
            for calibrate, rounding in ((False, "nearest"), (True, "nearest"), (True, "stochastic")):
                if not calibrate and family not in CALIBRATED:
                    continue
                torch.manual_seed(0)
                memory = compress_activations(
                    quant(**{family: bits}, calibrate=calibrate, rounding=rounding), state.blocks
                )
                fitted = "nearest" if family not in CALIBRATED else "calibrated" if calibrate else "fixed"
                kind = rounding if rounding == "stochastic" else fitted
                yield measured(family, f"{bits} bits, {kind}", state, memory, bits + scale, every=family == "linear")


def with_table(table: codebooks.Codebook, bits: int) -> Any:
    memory: Any = compress_activations(quant(pointwise=bits))
    memory.calibration.pointwise = lambda *args: table
    return memory


def grids(state: State) -> Iterator[Row]:
    """Ways to choose the levels of GELU', and layouts of groups."""
    for bits in (4, 2):
        make = functools.partial(codebooks.derivative_codebook, F.gelu, bits)
        uniform = make(entries=codebooks.uniform_entries(F.gelu, bits))
        centres = torch.linspace(-16, 16, codebooks.POINTWISE_BINS, dtype=torch.float64)
        density = codebooks.pointwise_weights(centres)
        slope = torch.autograd.grad(F.gelu(centres.requires_grad_()).sum(), centres)[0]
        mass = torch.zeros(2**bits, dtype=torch.float64).index_add_(0, uniform.bin_codes.long(), density)
        means = torch.zeros_like(mass).index_add_(0, uniform.bin_codes.long(), density * slope) / mass
        cells = codebooks.Codebook(bits, uniform.low, uniform.high, uniform.bin_codes, means.float())
        stochastic = make(stochastic=True, entries=codebooks.uniform_entries(F.gelu, bits))
        normal = make(weights=lambda x: torch.exp(-(x**2) / 2))
        for name, table in (
            ("uniform grid on f', nearest", uniform),
            ("the same, each level the mean of f' in its cell", cells),
            ("uniform grid on f', stochastic", stochastic),
            ("optimal for N(0,1), fixed", normal),
            ("optimal for N(-1, 1.4^2), fixed: ours without calibration", make()),
        ):
            memory = with_table(table, bits)
            if table is stochastic:
                seeds = iter(range(1, 10**6))
                memory.calibration.seed = lambda seeds=seeds: next(seeds)
            yield measured("grid", f"GELU', {2**bits} levels: {name}", state, memory, bits)
        yield measured(
            "grid", f"GELU', {2**bits} levels: calibrated", state, compress_activations(quant(pointwise=bits)), bits
        )
    for family, bits, group, name in (
        ("norm", 4, 192, "LN x^, a scale a token"),
        ("norm", 4, 64, "LN x^, groups of 64"),
        ("norm", 4, 32, "LN x^, groups of 32"),
        ("norm", 2, 32, "LN x^, groups of 32"),
        ("attention", 4, 32, "q, k, v, groups of 32"),
        ("attention", 8, 32, "q, k, v, groups of 32"),
        ("input", 8, 192, "block input, a scale a token"),
        ("input", 4, 32, "block input, groups of 32"),
        ("input", 4, 192, "block input, a scale a token"),
    ):
        for calibrate in (False, True) if family in CALIBRATED else (False,):
            memory = compress_activations(quant(**{family: bits}, group=group, calibrate=calibrate), state.blocks)
            setting = f"{name}, {bits} bits" + (", channels calibrated" if calibrate else "")
            yield measured("grid", setting, state, memory, bits + 16 / group)


def presets() -> dict[str, QuantConfig]:
    names = [file.stem for file in sorted((CONF / "quant").glob("*.yaml")) if file.stem not in ("none", "auto")]
    words = ["backbone=vit_t", "method=bias", "dataset=cifar10"]
    settings = {f"quant={name}": OmegaConf.to_object(compose([*words, f"quant={name}"]).quant) for name in names}
    return cast(dict[str, QuantConfig], settings)


def shipped(state: State, groups: list[dict]) -> Iterator[Row]:
    """The presets, and combinations of bits around them."""
    chosen = presets()
    for *bits, group in ((4, 4, 4, 32), (5, 5, 5, 32), (5, 4, 6, 32), (5, 5, 6, 64), (5, 6, 6, 64), (6, 6, 6, 64)):
        name = "pointwise {}, norm {}, attention {}, groups of {}".format(*bits, group)
        chosen[name] = quant(**dict(zip(("pointwise", "norm", "attention"), bits)), group=group)
    stock = state.kept(nullcontext())
    for name, config in chosen.items():
        if "Mobile" in state.name and not name.startswith("quant="):
            continue
        torch.manual_seed(0)
        memory = compress_activations(config, state.blocks)
        row = measured("preset", name, state, memory, None if "Mobile" in state.name else average_bits(config))
        row.kept = state.kept(memory) / stock
        if name.startswith("quant="):
            found, exact = state.gradients(memory), state.exact()
            for group in exact:
                cosine, error, *_ = compare({group: found[group]}, {group: exact[group]})
                groups.append({"preset": name, "state": state.name, "group": group, "cosine": cosine, "error": error})
        yield row


def average_bits(config: QuantConfig) -> float | None:
    """Of GELU' (4 elements), two x^ and q, k, v of a ViT block, scales included; None where one is not coded."""
    pointwise, norm, attention, scale = config.pointwise, config.norm, config.attention, 16 / config.group
    if pointwise is None or norm is None or attention is None:
        return None
    return (4 * pointwise + 2 * (norm + scale) + 3 * (attention + scale)) / 9


def means_of_draws(state: State) -> Iterator[Row]:
    """The mean gradient over n draws of stochastic rounding: noise falls as 1 / sqrt(n), and what stays is bias."""
    few = State(f"{state.name}, 16 photos", state.model, state.blocks, state.images[::4], state.labels[::4])
    for name, settings in (("pointwise, 2 bits", {"pointwise": 2}), ("norm, 4 bits", {"norm": 4})):
        yield measured("bias", f"{name}, nearest", few, compress_activations(quant(**settings)), None)
        memory, total = compress_activations(quant(**settings, rounding="stochastic")), None
        for draw in range(1, max(DRAWS) + 1):
            found = few.gradients(memory)
            total = found if total is None else {key: total[key] + found[key] for key in total}
            if draw in DRAWS:
                mean = {key: value / draw for key, value in total.items()}
                setting = f"{name}, mean of {draw} stochastic"
                yield Row("bias", setting, few.name, None, None, *compare(mean, few.exact()))


TITLES = {"preset": "Presets and combinations of bits", "grid": "Levels and layouts"}
TITLES["bias"] = "Stochastic rounding's bias"


def markdown(rows: list[Row], command: str) -> str:
    about = str(__doc__).split("\n\n")[3]
    lines = [f"# Fidelity of gradients\n\n`{command}`, torch {torch.__version__}. {about}"]
    for table, title in TITLES.items():
        if own := [row for row in rows if row.table == table]:
            lines += ["", f"## {title}", "", *listed(own, table == "preset")]
    for family in FAMILIES:
        if own := [row for row in rows if row.table == family]:
            lines += ["", f"## {family} alone: cosine (worst group)", "", *crossed(own)]
    return "\n".join(lines) + "\n"


def listed(rows: list[Row], shares: bool) -> Iterator[str]:
    kept = "| kept, of stock " if shares else ""
    yield f"| setting | state | bits {kept}| cosine | relative error | worst group | of |"
    yield "|---|---|---|---|---|---|---|" + ("---|" if shares else "")
    for row in rows:
        bits = "" if row.bits is None else f"{row.bits:.2f}"
        share = f"| {row.kept:.1%} " if shares else ""
        yield (
            f"| {row.setting} | {row.state} | {bits} {share}| {row.cosine:.5f} | {row.error:.4f} "
            f"| {row.worst_cosine:.4f} | {row.worst} |"
        )


def crossed(rows: list[Row]) -> Iterator[str]:
    """A row a number of bits, a column a kind of rounding and state."""
    cells = {(*row.setting.split(" bits, "), row.state): f"{row.cosine:.5f} ({row.worst_cosine:.3f})" for row in rows}
    columns = list(dict.fromkeys((kind, state) for _, kind, state in cells))
    yield "| bits | " + " | ".join(f"{kind}, {state}" for kind, state in columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for bits in dict.fromkeys(bits for bits, _, _ in cells):
        yield f"| {bits} | " + " | ".join(cells[bits, kind, state] for kind, state in columns) + " |"


def figure(rows: list[Row], path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no figure: matplotlib is not installed")
    shown, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, kind in zip(axes, ("fixed", "calibrated")):
        for family in FAMILIES:
            kinds = (kind, "nearest")
            own = [r for r in rows if r.table == family and r.state == "start" and r.setting.endswith(kinds)]
            axis.plot([r.bits for r in own], [1 - r.cosine for r in own], marker="o", label=family)
        axis.axhline(1e-3, color="grey", linestyle=":")
        axis.set(yscale="log", xlabel="bits an element, scales included", title=f"{kind} levels, nearest")
    axes[0].set_ylabel("1 - cosine to the exact gradient")
    axes[0].legend()
    shown.tight_layout()
    shown.savefig(path, dpi=120)


def read_rows(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    numbers = {field.name for field in fields(Row)} - {"table", "setting", "state", "worst"}
    with path.open(newline="") as file:
        table: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in table:
        row |= {key: float(row[key]) if row[key] else None for key in numbers}
    return [Row(**row) for row in table]


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--only", nargs="+", choices=("families", "grid", "bias", "presets"))
    arguments = parser.parse_args()
    chosen = arguments.only or ("presets", "grid", "families", "bias")
    tables = {table for part in chosen for table in {"presets": ("preset",), "families": FAMILIES}.get(part, (part,))}
    rows = [row for row in read_rows(arguments.out / "fidelity.csv") if row.table not in tables]
    groups: list[dict] = []
    start, trained, net = states(arguments.data)
    parts: dict[str, Callable[[State], Iterator[Row]]] = {
        "presets": functools.partial(shipped, groups=groups),
        "grid": grids,
        "families": families,
        "bias": means_of_draws,
    }
    for name, part in parts.items():
        if name in chosen:
            for state in {"presets": (start, trained, net), "bias": (start,)}.get(name, (start, trained)):
                rows += part(state)
    print(text := markdown(rows, "python benchmarks/fidelity/fidelity.py DATA"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "fidelity.md").write_text(text)
    write_csv(arguments.out / "fidelity.csv", [asdict(row) for row in rows])
    if groups:
        write_csv(arguments.out / "fidelity_groups.csv", groups)
    figure(rows, arguments.out / "fidelity.png")


if __name__ == "__main__":
    main()
