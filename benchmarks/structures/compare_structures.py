"""Which structure buys the most accuracy for its memory? An honest search that anyone can run again; docs/structures.md
has ours.

    .venv/bin/python benchmarks/structures/compare_structures.py WEIGHTS DATA... [key=value ...] [--search DATA...]
    [--seeds 0 1 2]
        [--only NAME...] [--workers 2] [--out runs/structures]

WEIGHTS: timm's vit_tiny_patch16_224.augreg_in21k_ft_in1k as .safetensors; those of another backbone together with
backbone=NAME. DATA: a train/ and test/ tree of class folders, or such a tree in a .tar, with settings for it alone
behind commas: photos.tar,optim.epochs=5. key=value goes to every run. Each contender takes the learning rate, of four
and of further ones while the best lies at an end, with the best mean of the validation accuracies on the DATA of the
search (by default all; seed 0, the test split is not read), then trains with every seed, and the test split is read
once for each of these runs. Contenders run without codes (quant=none); their memory is predicted for 224 px and a batch
of 64, each with the codes named below: of ViT-B/16, or of backbone=NAME. Runs that are finished are not repeated, so
that the same line goes on after a break. Written to OUT: table.md, and structures.png, accuracy against memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import cast

import pandas as pd
import torch
from matplotlib.figure import Figure

from s2a_cli import backbones
from s2a_cli.common import files
from s2a_cli.config.compose import compose
from s2a_cli.training import forecast, trainer
from s2a_cli.training.run import attach

LARGE, SMALL = (2e-3, 4e-3, 8e-3, 16e-3), (5e-5, 1e-4, 2e-4, 4e-4)
CONTENDERS = {  # name -> (words, learning rates, codes for the memory)
    "full": (["method=full"], SMALL, "none"),
    "linear": (["method=linear"], LARGE, "none"),
    "bias": (["method=bias"], LARGE, "tiny"),
    "prompt": (["method=prompt"], LARGE, "tiny"),
    "side": (["method=side"], LARGE, "tiny"),
    "bias + side": (["method=s2a", "method.prompt=null"], LARGE, "tiny"),
    "s2a": (["method=s2a"], LARGE, "tiny"),
    "s2a, last 5 blocks": (["method=s2a", "method.blocks=last:5"], LARGE, "none"),
    "s2a, 3 segments": (["method=s2a", "method.segments=3"], LARGE, "none"),
}


class Data:
    """A folder or archive, and the settings for it alone."""

    def __init__(self, text: str):
        root, *self.words = text.split(",")
        self.words.append(f"dataset.root={root}")
        self.name = Path(root).name.split(".")[0]

    def place(self, out: Path, stage: str, contender: str, last: str) -> str:
        return f"run_dir={out / stage / self.name / contender.replace(', ', '-').replace(' ', '-') / last}"


def calm(threads: int) -> None:
    """What a process of the pool begins with. Ctrl-C is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


def run(words: list[str]) -> dict[str, float]:
    """The accuracies of a run."""
    result, folder = trainer.train(compose(words), skip_finished=True)
    if result["status"] != "ok":
        raise SystemExit(f"{folder}: {result['status']}: {result['error']}")
    return cast(dict[str, float], result["accuracy"])


def chosen_rate(
    pool: ProcessPoolExecutor, name: str, words: list[str], rates: tuple[float, ...], search: list[Data], out: Path
) -> float:
    scores: dict[float, float] = {}
    while rates:
        lines = [
            [*words, f"optim.lr={rate}", "test=false", *data.words, data.place(out, "search", name, f"{rate:g}")]
            for rate in rates
            for data in search
        ]
        tops = [accuracy["val_top1"] for accuracy in pool.map(run, lines)]
        scores |= {rate: mean(tops[i * len(search) : (i + 1) * len(search)]) for i, rate in enumerate(rates)}
        best = max(scores, key=scores.__getitem__)
        beyond = {min(scores): best / 2, max(scores): best * 2}  # the best lies at an end: one more there
        rates = (beyond[best],) if best in beyond else ()
    shown = ", ".join(f"{rate:g}: {score:.2f}" for rate, score in sorted(scores.items()))
    print(f"{name}: validation top-1 by learning rate {shown}; taken: {best:g}", flush=True)
    return best


def tested(
    pool: ProcessPoolExecutor, name: str, words: list[str], rate: float, datas: list[Data], seeds: list[int], out: Path
) -> dict[str, list[float]]:
    """{data set: test top-1 in %, one a seed}."""
    lines = [
        [*words, f"optim.lr={rate}", f"seed={seed}", *data.words, data.place(out, "test", name, str(seed))]
        for data in datas
        for seed in seeds
    ]
    tops = [accuracy["test_top1"] for accuracy in pool.map(run, lines)]
    return {data.name: tops[i * len(seeds) : (i + 1) * len(seeds)] for i, data in enumerate(datas)}


def costs(backbone: str, words: list[str], codes: str) -> tuple[float, float]:
    """With 100 classes and a batch of 64: the predicted peak in MiB, and the share of parameters that train, in %."""
    config = compose([backbone, "dataset=cifar100", "optim.batch_size=64", *words, f"quant={codes}"])
    built = backbones.build(config.backbone, 100, meta=True)
    attached = attach(config, built)
    return forecast.predict_step(attached, config, 50_000).peak_mib, built.count()["percent"]


def draw(table: pd.DataFrame, backbone: str, path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, row in table.iterrows():
        axes.errorbar(row["peak MiB"], row["mean"], yerr=row["std"], marker="o", capsize=3)
        axes.annotate(f"{name}: {row.codes}", (row["peak MiB"], row["mean"]), xytext=(6, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel=f"predicted peak of a step, {backbone}, batch 64, MiB", ylabel="mean test top-1, %")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("words", nargs="+", metavar="DATA | key=value")
    parser.add_argument("--search", nargs="+", metavar="DATA")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/structures"))
    args = parser.parse_intermixed_args()
    changes = [word for word in args.words if "=" in word.split(",")[0]]
    datas = [Data(word) for word in args.words if word not in changes]
    search = [Data(word) for word in args.search or ()] or datas
    if not datas:
        parser.error("give DATA: a folder of images")
    backbone = next((word for word in changes if word.startswith("backbone=")), "backbone=vit_b")
    threads = max(1, (os.cpu_count() or 1) // args.workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context, initializer=calm, initargs=(threads,)) as pool:
        rows = {}
        for name in args.only:
            structure, rates, codes = CONTENDERS[name]
            words = ["experiment=photos_112", f"backbone.checkpoint={args.weights}", *structure, "quant=none", *changes]
            rate = chosen_rate(pool, name, words, rates, search, args.out)
            found = tested(pool, name, words, rate, datas, args.seeds, args.out)
            peak, percent = costs(backbone, structure, codes)
            of_seeds = [mean(tops) for tops in zip(*found.values())]  # over the data sets
            rows[name] = {data: mean(tops) for data, tops in found.items()} | {
                "mean": mean(of_seeds),
                "std": stdev(of_seeds) if len(of_seeds) > 1 else float("nan"),
                "lr": rate,
                "codes": codes,
                "peak MiB": peak,
                "% trained": percent,
            }
            table = pd.DataFrame.from_dict(rows, orient="index")
            files.atomic_write(args.out / "table.md", table.to_markdown(floatfmt=".4g") + "\n")
            draw(table, backbone, args.out / "structures.png")
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
