"""Which structure buys the most accuracy for its memory? An honest search that anyone can run again; docs/structures.md has ours.

    .venv/bin/python scripts/compare_structures.py WEIGHTS FOLDER... [--seeds 0 1 2] [--only NAME...] [--out runs/structures] [key=value ...]

WEIGHTS: timm's vit_tiny_patch16_224.augreg_in21k_ft_in1k as .safetensors. FOLDER: a train/ and test/ tree of class folders,
or such a tree in a .tar. key=value goes to every run.
Each contender takes the learning rate, of four, with the best mean of the FOLDERs' validation accuracies (seed 0, the test split is
not read), then trains with every seed, and the test split is read once for each of these runs. Contenders run without codes
(quant=none); their memory is predicted for ViT-B/16, 224 px, a batch of 64, each with the codes named below.
Runs that are finished are not repeated, so that the same line goes on after a break. Written to OUT: table.md, and
structures.png, accuracy against memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev

import pandas as pd
from matplotlib.figure import Figure

from s2a_cli import backbones, records, training
from s2a_cli.compose import compose

LARGE, SMALL = (2e-3, 4e-3, 8e-3, 16e-3), (5e-5, 1e-4, 2e-4, 4e-4)
CONTENDERS = {  # name -> (words, learning rates, codes for the memory on ViT-B/16)
    "full": (["method=full"], SMALL, "none"),
    "linear": (["method=linear"], LARGE, "tiny"),
    "bias": (["method=bias"], LARGE, "tiny"),
    "prompt": (["method=prompt"], LARGE, "tiny"),
    "side": (["method=side"], LARGE, "tiny"),
    "s2a": (["method=s2a"], LARGE, "tiny"),
    "bias, last half": (["method=bias", "method.blocks=last:6"], LARGE, "tiny"),
    "bias in the last half, side": (["method=s2a", "method.prompt=null", "method.blocks=last:6"], LARGE, "tiny"),
}


def run(folder: Path, words: list[str]) -> records.Result:
    result, _ = training.train(compose([*words, f"run_dir={folder}"]), once=True)
    if result["status"] != "ok":
        raise SystemExit(f"{folder}: {result['status']}: {result['error']}")
    return result


def place(out: Path, stage: str, root: str, name: str, last: str) -> Path:
    return out / stage / Path(root).name.split(".")[0] / name.replace(", ", "-").replace(" ", "-") / last


def chosen_rate(name: str, words: list[str], rates: tuple[float, ...], roots: list[str], out: Path) -> float:
    scores = {}
    for rate in rates:
        lines = [[*words, f"optim.lr={rate}", f"dataset.root={root}", "test=false"] for root in roots]
        runs = [run(place(out, "search", root, name, f"{rate:g}"), line) for root, line in zip(roots, lines)]
        scores[rate] = mean(result["accuracy"]["val_top1"] for result in runs)
    best = max(scores, key=scores.get)
    shown = ", ".join(f"{rate:g}: {score:.2f}" for rate, score in scores.items())
    print(f"{name}: validation top-1 by learning rate {shown}; taken: {best:g}", flush=True)
    return best


def tested(name: str, words: list[str], rate: float, roots: list[str], seeds: list[int], out: Path) -> dict[str, list[float]]:
    """{folder: test top-1 in %, one a seed}."""
    found = {}
    for root in roots:
        lines = {seed: [*words, f"optim.lr={rate}", f"dataset.root={root}", f"seed={seed}"] for seed in seeds}
        runs = [run(place(out, "test", root, name, str(seed)), line) for seed, line in lines.items()]
        found[Path(root).name.split(".")[0]] = [result["accuracy"]["test_top1"] for result in runs]
    return found


def costs(words: list[str], codes: str) -> tuple[float, float]:
    """On ViT-B/16 with 100 classes and a batch of 64: the predicted peak in MiB, and the share of parameters that train, in %."""
    config = compose(["backbone=vit_b", "dataset=cifar100", "optim.batch_size=64", *words, f"quant={codes}"])
    backbone = backbones.build(config.backbone, 100, meta=True)
    training.attach(config, backbone)
    return training.predict_step(backbone, config, 50_000).peak_mib, backbone.count()["percent"]


def draw(table: pd.DataFrame, path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, row in table.iterrows():
        axes.errorbar(row["peak MiB"], row["mean"], yerr=row["std"], marker="o", capsize=3)
        axes.annotate(name, (row["peak MiB"], row["mean"]), xytext=(6, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel="predicted peak of a step on ViT-B/16, batch 64, MiB", ylabel="mean test top-1, %, on ViT-Ti/16")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("words", nargs="+", metavar="FOLDER | key=value")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/structures"))
    args = parser.parse_intermixed_args()
    roots = [word for word in args.words if "=" not in word]
    changes = [word for word in args.words if "=" in word]
    if not roots:
        parser.error("give a FOLDER of images")
    rows = {}
    for name in args.only:
        structure, rates, codes = CONTENDERS[name]
        words = ["experiment=photos_112", f"backbone.checkpoint={args.weights}", *structure, "quant=none", *changes]
        rate = chosen_rate(name, words, rates, roots, args.out)
        found = tested(name, words, rate, roots, args.seeds, args.out)
        peak, percent = costs(structure, codes)
        of_seeds = [mean(tops) for tops in zip(*found.values())]  # over the folders
        rows[name] = {folder: mean(tops) for folder, tops in found.items()} | {
            "mean": mean(of_seeds),
            "std": stdev(of_seeds) if len(of_seeds) > 1 else float("nan"),
            "lr": rate,
            "codes": codes,
            "peak MiB": peak,
            "% trained": percent,
        }
        table = pd.DataFrame.from_dict(rows, orient="index")
        records.atomic_write(args.out / "table.md", table.to_markdown(floatfmt=".2f") + "\n")
        draw(table, args.out / "structures.png")
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
