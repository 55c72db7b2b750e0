"""Does remembering less cost accuracy? The same runs with several `quant=`, paired by data set and seed.

    python benchmarks/accuracy.py WEIGHTS FOLDER... [--quants none int4 tiny] [--seeds 0 1 2] [--out runs/accuracy] [key=value ...]

WEIGHTS: timm's vit_tiny_patch16_224.augreg_in21k_ft_in1k as .safetensors. FOLDER: a train/ and test/ tree of class folders,
or such a tree in a .tar. Bias tuning at 112 px by default; key=value changes the runs. Prints the top-1 of each run, and of
each quant the mean difference to the first one with its standard error over the pairs. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

from omegaconf import OmegaConf

from s2a_cli import records
from s2a_cli.compose import compose
from s2a_cli.training import train


def run(folder: Path, words: list[str]) -> records.Result:
    config = compose([*words, f"run_dir={folder}"])
    if (folder / "result.json").is_file():
        result = records.read_result(folder)
        if result["status"] == "ok" and result["config"] == OmegaConf.to_container(config):
            return result
    print(f"\n{folder}", flush=True)
    result, _ = train(config)
    if result["status"] != "ok":
        raise SystemExit(f"{folder}: {result['status']}: {result['error']}")
    return result


def report(results: dict[tuple[str, int, str], records.Result], quants: list[str]) -> str:
    """A markdown table: a row a data set and seed, then the mean differences to the first quant."""
    top1 = {key: result["accuracy"]["test_top1"] for key, result in results.items()}
    pairs = sorted({key[:2] for key in top1})
    lines = ["| dataset | seed | " + " | ".join(quants) + " |", "|---" * (len(quants) + 2) + "|"]
    for dataset, seed in pairs:
        row = [top1[dataset, seed, quant] for quant in quants]
        lines.append(f"| {dataset} | {seed} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    for name in [*sorted({dataset for dataset, _ in pairs}), "all"]:
        cells = []
        for quant in quants:
            chosen = [pair for pair in pairs if name in ("all", pair[0])]
            gaps = [top1[*pair, quant] - top1[*pair, quants[0]] for pair in chosen]
            error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
            mean = statistics.fmean(top1[*pair, quant] for pair in chosen)
            cells.append(f"{mean:.2f}" + ("" if quant == quants[0] else f" ({statistics.fmean(gaps):+.2f} ± {error:.2f})"))
        lines.append(f"| **{name}** | mean | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("words", nargs="+", metavar="FOLDER | key=value")
    parser.add_argument("--quants", nargs="+", default=["none", "int4", "tiny"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--write", type=Path, help="also write the table, and a .json beside it, here")
    args = parser.parse_intermixed_args()
    roots = [word for word in args.words if "=" not in word]
    changes = [word for word in args.words if "=" in word]
    common = ["experiment=photos_112", f"backbone.checkpoint={args.weights}", "method=bias", *changes]
    results = {}
    for seed in args.seeds:
        for root in roots:
            for quant in args.quants:
                name = Path(root).stem
                words = [*common, f"quant={quant}", f"seed={seed}", f"dataset.root={root}"]
                results[name, seed, quant] = run(args.out / name / quant / str(seed), words)
    table = report(results, args.quants)
    print(table)
    if args.write:
        first = next(iter(results.values()))
        kept = {"/".join(map(str, key)): result["accuracy"] | {"id": result["id"]} for key, result in results.items()}
        record = {"changes": changes, "runs": kept, "config": first["config"], "environment": first["environment"]}
        records.atomic_write(args.write, f"Bias tuning, top-1 on test in %: {' '.join(changes)}\n\n{table}")
        records.atomic_write(args.write.with_suffix(".json"), json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
