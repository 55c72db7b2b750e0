"""How long each method takes to reach full fine-tuning's accuracy within a twelfth of its memory.

    python benchmarks/planner/time_to_accuracy.py WEIGHTS DATA... [key=value ...] [--seeds 0 1 2] [--share 12]
        [--rates FILE] [--out benchmarks/planner/time_to_accuracy.json]

WEIGHTS: timm's vit_tiny_patch16_224.augreg_in21k_ft_in1k as .safetensors. DATA: a train/ and test/ tree of class
folders, or such a tree in a .tar, with settings for it alone behind commas. key=value goes to every run.

Full fine-tuning trains first, whole batches and no budget, at the learning rate that is best on validation, of two and
of further ones while the best lies at an end: its test accuracy, at the epoch that is best on validation, in the mean
of the seeds, times 0.987 is what is to be reached, and its predicted peak over SHARE is the budget. Then each method
trains as the planner has it (fidelity=0.999 backbone.weights=auto); its learning rate is that of the comparison of
methods (RATES, a result of compare_structures.py), or, of methods of the last blocks, found as full fine-tuning's is,
unless OUT has it. Methods train in alternation, a seed after another.
The time is that of planning, of filling the cache of features, of training and of validation, up to the end of the
first epoch behind which the test split is at the accuracy; looking at that split takes none of it. Methods that nothing
fits are named. Written to OUT after every run, as JSON and as a table; what OUT has from another call stays there,
and full fine-tuning is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

from tabulate import tabulate
from torch import Tensor

from s2a_cli.common import files
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.planner.run_plan import plan_run
from s2a_cli.results import record
from s2a_cli.training import feature_cache, forecast
from s2a_cli.training.environment import environment
from s2a_cli.training.evaluation import accuracy
from s2a_cli.training.loop import TrainLoop
from s2a_cli.training.run import Run, prepare
from s2a_cli.training.trainer import planned

ROOT = Path(__file__).resolve().parents[2]
ENOUGH = 0.987  # of full fine-tuning's accuracy, as the paper of S2A reports
PLANNED = ("fidelity=0.999", "backbone.weights=auto")
FULL_RATES, LAST_RATES = (2e-4, 4e-4), (4e-3, 8e-3)  # the first two
CACHED = ("dataset.cache=features", "dataset.scale=null")
METHODS: dict[str, list[str]] = {  # name -> words; the first part of a name is what the comparison calls it
    "side, cached features": ["method=side", *CACHED],
    "linear, cached features": ["method=linear", *CACHED],
    "s2a, last 6 blocks, cached features": ["method=s2a", "method.blocks=last:6", *CACHED],
    "bias, last 6 blocks, cached features": ["method=bias", "method.blocks=last:6", *CACHED],
    "side": ["method=side"],
    "s2a": ["method=s2a"],
    "bias": ["method=bias"],
    "lora": ["method=lora"],
    "linear": ["method=linear"],
    "full": ["method=full"],
}
Entry = dict[str, Any]


class Timed(TrainLoop):
    """Notes behind each epoch how long the run has taken, and the accuracy on the test split, which takes no time."""

    begun = 0.0
    tests: ClassVar[dict[Any, list[tuple[Tensor, Tensor]]]] = {}  # batches of test splits, which every run looks at

    def __call__(self, state: dict[str, Any] | None) -> None:
        self.reached: list[tuple[float, float]] = []
        self.looked = 0.0
        super().__call__(state)

    def _epoch(self, *args: Any) -> None:
        super()._epoch(*args)
        now = time.monotonic()
        cache, self.run.cache = self.run.cache, None  # which the test split is not in
        config = self.run.config
        split = config.dataset.root, config.backbone.image_size
        if split not in self.tests:
            self.tests[split] = list(self.run.loader("test"))
        top1 = accuracy(self.run, self.tests[split])["top1"] or 0.0
        self.run.cache = cache
        self.reached.append((now - self.begun - self.looked, top1))
        self.looked += time.monotonic() - now


def train(words: list[str]) -> Entry:
    """Trains one run; returns (seconds, test top-1) behind each epoch, and what it was planned to need."""
    begun, config = time.monotonic(), compose([*words, "test=false"])
    run: Run = prepare(config)
    plan = planned(run, plan_run, None)
    run.model.to(run.device)
    if run.feature_head:
        run.cache = feature_cache.opened(run)
    predicted = forecast.predict(run)
    known = record.RecordBuilder(run.run_id, {}, {}, {}, run.weights, {})  # pyright: ignore[reportArgumentType] (unread)
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    loop = Timed(run, folder, known)
    loop.begun = begun
    loop(None)
    for kept in run.cache.kept.values() if run.cache else ():
        kept.discard()  # the next run is to fill its own
    best = (known.accuracy["best_epoch"] or 1) - 1
    return {
        "epochs": loop.reached,
        "val_top1": known.accuracy["val_top1"],
        "test_top1": loop.reached[best][1],
        "planned": plan["choices"][0]["about"] if plan else None,
        "planning_seconds": plan["seconds"] if plan else 0.0,
        "peak_mib": predicted["peak_mib"] if predicted else None,
    }


def seconds_to(entry: Entry, wanted: float) -> float | None:
    """Returns the seconds up to an accuracy; None where it was not reached."""
    return next((seconds for seconds, top1 in entry["epochs"] if top1 >= wanted), None)


def table(result: Entry) -> str:
    """Returns the result as a page."""
    pages = ["# Time to full fine-tuning's accuracy, in little memory"]
    for name, data in result["data"].items():
        if "wanted" not in data:
            continue
        said = f"full fine-tuning {data['full_top1']:.1f} %, wanted {data['wanted']:.1f} % within {data['budget']}"
        rows = []
        for method, runs in data["methods"].items():
            if isinstance(runs, str):
                rows.append([method, "–", "", "", runs])
                continue
            times = [seconds_to(run, data["wanted"]) for run in runs]
            there = [seconds for seconds in times if seconds is not None]
            shown = f"{mean(there):.0f}" if len(there) == len(times) else f"{len(there)} of {len(times)} reach it"
            plans = ", ".join(dict.fromkeys(run["planned"] or "" for run in runs))
            rows.append(
                [method, shown, f"{mean(run['test_top1'] for run in runs):.1f}", f"{runs[0]['peak_mib']:.0f}", plans]
            )
        head = ["method", "seconds", "test top-1 %", "peak, MiB", "planned"]
        made = "  \n".join(
            f"`{one['command']}`, {one['environment']['device']}, torch {one['environment']['torch']}, {one['date']}."
            for one in (data, *data.get("later", ()))
        )
        pages += [f"## {name}: {said}", made, tabulate(rows, head, tablefmt="github", disable_numparse=True)]
    return "\n\n".join(pages) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("words", nargs="+", metavar="DATA | key=value")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=12.0)
    parser.add_argument("--only", nargs="+", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--rates", type=Path, default=ROOT / "benchmarks/structures/vit_t_112.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "time_to_accuracy.json")
    args = parser.parse_intermixed_args(argv)
    changes = [word for word in args.words if "=" in word.split(",")[0]]
    compared = json.loads(args.rates.read_text())
    compared = compared.get("structures", compared)
    about = {
        "command": " ".join(["python benchmarks/planner/time_to_accuracy.py", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment("cpu"),
    }

    def words_of(method: str, root: str, own: list[str], seed: int) -> list[str]:
        rate = next(word for word in compared[method.split(",")[0]]["words"] if word.startswith("optim.lr="))
        common = ["experiment=photos_112", f"backbone.checkpoint={args.weights}", f"dataset.root={root}"]
        common += [] if method == "full" or "last" in method else [rate]
        place = f"run_dir=runs/time_to_accuracy/{Path(root).stem}/{method.replace(', ', '_').replace(' ', '_')}/{seed}"
        return [*common, *METHODS[method], *own, *changes, f"seed={seed}", place]

    def save(name: str, data: Entry) -> None:
        result: Entry = json.loads(args.out.read_text()) if args.out.exists() else {"data": {}}
        result["data"][name] = data
        files.atomic_write(args.out, json.dumps(result, indent=1) + "\n")
        files.atomic_write(args.out.with_suffix(".md"), table(result))

    def searched(words: list[str], first: tuple[float, ...]) -> dict[float, Entry]:
        """Returns the runs of the first seed by learning rate, the best on validation first."""
        tried: dict[float, Entry] = {}
        rates = list(first)
        while rates:
            tried |= {rate: train([*words, f"optim.lr={rate:g}"]) for rate in rates}
            best = max(tried, key=lambda rate: tried[rate]["val_top1"])
            beyond = {min(tried): best / 2, max(tried): best * 2}
            rates = [beyond[best]] if best in beyond else []
        return dict(sorted(tried.items(), key=lambda item: item[1]["val_top1"], reverse=True))

    for word in args.words:
        if word in changes:
            continue
        root, *own = word.split(",")
        first, *others = args.seeds
        known: Entry = json.loads(args.out.read_text())["data"] if args.out.exists() else {}
        data: Entry = known.get(Path(root).stem) or about | {"methods": {}}
        if "wanted" in data:
            data["later"] = [*data.get("later", ()), about]
        else:
            tried = searched(words_of("full", root, own, first), FULL_RATES)
            rate = f"{next(iter(tried)):g}"
            full = [next(iter(tried.values()))]
            full += [train([*words_of("full", root, own, seed), f"optim.lr={rate}"]) for seed in others]
            data |= {"full_rate": rate, "full_tried": {f"{rate:g}": run["val_top1"] for rate, run in tried.items()}}
            top1 = mean(run["test_top1"] for run in full)
            data |= {"full": full, "full_top1": top1, "wanted": ENOUGH * top1}
            data["budget"] = f"{full[0]['peak_mib'] / args.share:.1f}MiB"
            save(Path(root).stem, data)
        runs: dict[str, list[Entry]] = {method: [] for method in args.only}
        found = {method: old[0].get("rate") for method, old in data["methods"].items() if isinstance(old, list)}
        rates = {method: f"{rate:g}" for method, rate in found.items() if rate} | {"full": data["full_rate"]}
        for seed, method in itertools.product(args.seeds, args.only):  # what else the machine does meets all methods
            if method not in runs:
                continue
            words = [*words_of(method, root, own, seed), f"budget={data['budget']}", *PLANNED]
            try:
                if "last" in method and method not in rates:
                    rate, run = next(iter(searched(words, LAST_RATES).items()))
                    rates[method] = f"{rate:g}"
                else:
                    run = train([*words, *([f"optim.lr={rates[method]}"] if method in rates else [])])
                fits = run["peak_mib"] is not None and run["peak_mib"] <= data["full"][0]["peak_mib"] / args.share
                runs[method].append(run | ({"rate": float(rates[method])} if method in rates else {}))
                data["methods"][method] = runs[method] if fits else f"needs {run['peak_mib']} MiB"
            except UserError as error:
                data["methods"][method] = str(error).splitlines()[0]
            if isinstance(data["methods"][method], str):
                del runs[method]
            save(Path(root).stem, data)
    print(args.out.with_suffix(".md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
