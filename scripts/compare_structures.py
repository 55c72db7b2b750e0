"""The README's tables of real photos: six methods, several seeds, learning rates chosen on validation by one small grid.

    .venv/bin/python scripts/compare_methods.py WEIGHTS GRID FOLDER... [--seeds 0 1 2] [--out runs/photos] [key=value ...]

WEIGHTS: timm's vit_tiny_patch16_224.augreg_in21k_ft_in1k as .safetensors. GRID, FOLDER: train/ and test/ trees of class
folders, or such a tree in a .tar. Each method takes the learning rate with the best validation accuracy on GRID (seed 0),
of the same two for all but full fine-tuning, which wants smaller ones; no test split has a part in the choice.
Runs that are finished are not repeated, so that the same line goes on after a break. key=value goes to the runs on
FOLDERs, not to the grid's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from s2a_cli import records, tables
from s2a_cli.compose import compose
from s2a_cli.training import train

RATES = [4e-3, 8e-3]
METHODS = {"full": [1e-4, 2e-4, 4e-4, 8e-4], "linear": RATES, "bias": RATES, "prompt": RATES, "side": RATES, "s2a": RATES}


def run(folder: Path, words: list[str]) -> records.Result:
    result, _ = train(compose([*words, f"run_dir={folder}"]), once=True)
    if result["status"] != "ok":
        raise SystemExit(f"{folder}: {result['status']}: {result['error']}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("grid")
    parser.add_argument("words", nargs="+", metavar="FOLDER | key=value")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/photos"))
    args = parser.parse_intermixed_args()
    roots = [word for word in args.words if "=" not in word]
    changes = [word for word in args.words if "=" in word]
    common = ["experiment=photos_112", f"backbone.checkpoint={args.weights}"]
    chosen = {}
    for method in args.methods:
        scores = {}
        for rate in METHODS[method]:
            words = [*common, f"method={method}", f"optim.lr={rate}", f"dataset.root={args.grid}"]
            scores[rate] = run(args.out / "grid" / method / f"{rate:g}", words)["accuracy"]["val_top1"]
        chosen[method] = max(scores, key=scores.get)
        print(f"{method}: validation top-1 by learning rate {scores}: {chosen[method]:g}", flush=True)
    for root in roots:
        for method, rate in chosen.items():
            for seed in args.seeds:
                words = [*common, *changes, f"method={method}", f"optim.lr={rate}", f"seed={seed}", f"dataset.root={root}"]
                run(args.out / "test" / Path(root).name / method / str(seed), words)
    print(tables.render(tables.table(tables.load([args.out / "test"])), "md"))


if __name__ == "__main__":
    main()
