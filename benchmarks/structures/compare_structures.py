"""Which structure buys the most accuracy for its memory? One search protocol for all, that anyone can run again.

    .venv/bin/python benchmarks/structures/compare_structures.py WEIGHTS DATA... [key=value ...] [--search DATA...]
    [--seeds 0 1 2] [--search-seeds 0 1 2] [--settings FILE] [--only NAME...] [--workers 2] [--out runs/structures]

WEIGHTS: timm's vit_tiny_patch16_224.augreg_in21k_ft_in1k as .safetensors; those of another backbone together with
backbone=NAME. DATA: a train/ and test/ tree of class folders, or such a tree in a .tar, with settings for it alone
behind commas: photos.tar,optim.epochs=5. key=value goes to every run. NAME: a structure, several as bias+side, or one
of the contenders below.

Each contender takes the learning rate, of four and of further ones while the best lies at an end, with the best mean
of the validation accuracies on the DATA and the seeds of the search: by default all DATA and three seeds, each with a
split of its own (of one seed, the choice is something of a draw). The test split is not read. With --settings FILE,
the results of another comparison, nothing is searched for the contenders in it. Where its paper tunes another number
a task, the best of three of these is taken likewise. Then it trains with every seed and its split, and the test split
is read once for each of these runs, at the epoch that was best on validation; the validation accuracy of the last
epoch stands beside it. Contenders run without codes (quant=none); their memory is predicted for 224 px and a batch of
64, of ViT-B/16 or of backbone=NAME, without codes and with quant=tiny in 8 chunks, which trains BatchNorms only
without. Runs that are finished are not repeated, so that the same line goes on after a break. A contender that fails
is named, and the others go on. Written to OUT: results.json, table.md, and structures.png, accuracy against memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import cast

import shared_photos
import torch
from compare_report import RESULTS, Entry, load, report
from peaks import predicted

from s2a_cli.common import files
from s2a_cli.config.compose import compose
from s2a_cli.results.run_folder import METRICS
from s2a_cli.training import duration, forecast, step, trainer

LARGE, SMALL = (1e-3, 2e-3, 4e-3, 8e-3), (5e-5, 1e-4, 2e-4, 4e-4)
CONTENDERS = ["linear", "bias", "prompt", "side", "bias+side", "s2a", "full", "full+side", "lora", "lora+side"]
SPECIAL = {  # contenders that are no plain list of structures -> their words
    "s2a, last 5 blocks": ["method=s2a", "method.blocks=last:5"],
    "s2a, 3 segments": ["method=s2a", "method.segments=3"],
    "bias + prompt": ["method=s2a", "method.side=null"],
    "head2toe": ["method=head2toe", "method.select_after=50"],  # of some hundred steps
}
PRETRAINED = ("full", "partial")  # structures that change pretrained weights, by smaller steps
MOST = 8  # learning rates that are tried at most
BUSY = 3  # processes that one contender keeps busy: between its rounds they would wait
Knob = dict[str, tuple[float, ...]]  # a key -> its values
SCALES: Knob = {"method.scale": (0.1, 1, 10)}
TOKENS: Knob = {"method.tokens": (5, 10, 50)}
KNOBS: dict[str, Knob] = {  # contender -> the number that its paper tunes a task
    **dict.fromkeys(("fact_tt", "fact_tk", "repadapter", "convpass", "adaptformer"), SCALES),
    **dict.fromkeys(("vpt_shallow", "vpt_deep"), TOKENS),
    "adapter_plus": {"method.dim": (2, 8, 32)},
}


def words_of(name: str) -> list[str]:
    """The words that choose a contender."""
    return SPECIAL.get(name) or [f"method=[{name.replace('+', ',')}]"]


def rates_of(name: str) -> tuple[float, ...]:
    """The learning rates that are tried first."""
    return SMALL if set(name.split("+")) & set(PRETRAINED) else LARGE


class Data:
    """A folder or archive, and the settings for it alone."""

    def __init__(self, text: str):
        root, *self.words = text.split(",")
        self.words.append(f"dataset.root={root}")
        self.name = Path(root).name.split(".")[0]

    def place(self, out: Path, stage: str, contender: str, last: str) -> str:
        last = re.sub("[^A-Za-z0-9.+-]+", "_", last.replace("optim.lr=", "").replace("method.", ""))
        return f"run_dir={out / stage / self.name / re.sub('[, ]+', '-', contender) / last}"


def calm(threads: int, photos: Path) -> None:
    """What a process of the pool begins with. Ctrl-C is the parent's.

    Runs of seconds neither predict their memory and their time, nor make an image again that another one made, nor
    capture CUDA graphs anew after each evaluation.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    forecast.predict = lambda run: None
    duration.is_worth_saying = lambda run: False
    step.Step.release = lambda self: None
    shared_photos.share(photos)


def run(words: list[str]) -> dict[str, float]:
    """The accuracies of a run, and `last`: that on validation at the end."""
    result, folder = trainer.train(compose(words), skip_finished=True)
    torch.cuda.empty_cache()  # of the graphs that nothing released; other processes need it
    if result["status"] != "ok":
        raise RuntimeError(f"{folder}: {result['status']}: {result['error']}")
    last = json.loads((folder / METRICS).read_text().splitlines()[-1])
    return cast(dict[str, float], result["accuracy"]) | {"last": last["val_top1"]}


def of_seed(seed: int) -> list[str]:
    """The words of a seed, which has a validation split of its own."""
    return [f"seed={seed}", f"dataset.split_seed={seed}"]


class Search:
    """Mean validation accuracies on the data and seeds of the search; the test split is not read."""

    def __init__(
        self, pool: ProcessPoolExecutor, name: str, words: list[str], datas: list[Data], seeds: list[int], out: Path
    ):
        self.pool, self.name, self.words, self.datas, self.seeds, self.out = pool, name, words, datas, seeds, out

    def scores(self, tried: list[str]) -> list[float]:
        """Of several settings, each words of a config in one text."""
        lines = [
            [*self.words, *text.split(), *of_seed(seed), "test=false", *data.words, self.place(data, text, seed)]
            for text in tried
            for data in self.datas
            for seed in self.seeds
        ]
        tops = [accuracy["val_top1"] for accuracy in self.pool.map(run, lines)]
        size = len(self.datas) * len(self.seeds)
        return [mean(tops[i * size : (i + 1) * size]) for i in range(len(tried))]

    def place(self, data: Data, text: str, seed: int) -> str:
        """The folder of a run."""
        return data.place(self.out, "search", self.name, f"{text} seed{seed}")

    def rate(self, rates: tuple[float, ...]) -> dict[float, float]:
        """{learning rate: score}, with further ones while the best lies at an end."""
        found: dict[float, float] = {}
        while rates:
            found |= dict(zip(rates, self.scores([f"optim.lr={rate:g}" for rate in rates]), strict=True))
            best = max(found, key=found.__getitem__)
            beyond = {min(found): best / 2, max(found): best * 2}
            rates = (beyond[best],) if best in beyond and len(found) < MOST else ()
        return dict(sorted(found.items()))

    def chosen(self) -> tuple[list[str], dict[str, float]]:
        """The words of the best setting, and every score."""
        rates = self.rate(rates_of(self.name))
        best = [f"optim.lr={max(rates, key=rates.__getitem__):g}"]
        scores = {f"{rate:g}": score for rate, score in rates.items()}
        for key in KNOBS.get(self.name, ()):
            tried = [f"{best[0]} {key}={value}" for value in KNOBS[self.name][key]]
            knob = dict(zip(tried, self.scores(tried), strict=True))
            scores |= {text.split()[-1]: score for text, score in knob.items()}
            best = max(knob, key=knob.__getitem__).split()
        shown = ", ".join(f"{text}: {score:.2f}" for text, score in scores.items())
        print(f"{self.name}: validation top-1 {shown}; taken: {' '.join(best)}", flush=True)
        return best, scores


def tested(
    pool: ProcessPoolExecutor, name: str, words: list[str], datas: list[Data], seeds: list[int], out: Path
) -> Entry:
    """Test top-1 in %, and validation top-1 at the last epoch: {data set: [one a seed]}."""
    lines = [
        [*words, *of_seed(seed), *data.words, data.place(out, "test", name, str(seed))]
        for data in datas
        for seed in seeds
    ]
    found = list(pool.map(run, lines))

    def by_data(key: str) -> dict[str, list[float]]:
        tops = [accuracy[key] for accuracy in found]
        return {data.name: tops[i * len(seeds) : (i + 1) * len(seeds)] for i, data in enumerate(datas)}

    return {"test": by_data("test_top1"), "last": by_data("last")}


def costs(backbone: str, words: list[str]) -> Entry:
    """Predicted peaks in MiB by quant=, and the share of parameters that train, in %."""
    found = {codes: predicted(backbone, words, codes) for codes in ("none", "tiny")}
    entry: Entry = {"peaks": {codes: figure.get("peak_mib") for codes, figure in found.items()}}
    return entry | {"percent": found["none"].get("percent")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("words", nargs="+", metavar="DATA | key=value")
    parser.add_argument("--search", nargs="+", metavar="DATA")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--search-seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--settings", type=Path, help="results.json of a comparison whose settings are taken")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/structures"))
    args = parser.parse_intermixed_args()
    changes = [word for word in args.words if "=" in word.split(",")[0]]
    datas = [Data(word) for word in args.words if word not in changes]
    search = [Data(word) for word in args.search or ()] or datas
    if not datas:
        parser.error("give DATA: a folder of images")
    if args.settings and not args.settings.is_file():
        parser.error(f"--settings {args.settings}: no such file; give the results.json of a comparison")
    chosen = next((word for word in changes if word.startswith("backbone=")), "backbone=vit_b")
    backbone = chosen.removeprefix("backbone=")
    # Where a GPU computes, threads of a process that wait for one another only keep cores from other processes.
    threads = 1 if torch.cuda.is_available() else max(1, (os.cpu_count() or 1) // args.workers)
    lock = threading.Lock()
    context = multiprocessing.get_context("spawn")
    known: dict[str, Entry] = json.loads(args.settings.read_text()) if args.settings else {}

    def compare(name: str) -> None:
        """Searches and tests one contender, and adds it to the results."""
        common = ["experiment=photos_112", f"backbone.checkpoint={args.weights}", *words_of(name), "quant=none"]
        words = [*common, *changes]
        if name in known:
            best, scores = known[name]["words"][len(words_of(name)) :], {}
        else:
            best, scores = Search(pool, name, words, search, args.search_seeds, args.out).chosen()
        found = tested(pool, name, [*words, *best], datas, args.seeds, args.out)
        cost = pool.submit(costs, backbone, words_of(name)).result()
        entry = {"words": [*words_of(name), *best], "validation": scores} | found | cost
        with lock:
            entries = load(args.out) | {name: entry}
            files.atomic_write(args.out / RESULTS, json.dumps(entries, indent=1) + "\n")
            report(entries, args.out, backbone)

    def tried(name: str) -> bool:
        """Tells whether a contender came to its end; what stopped it is said."""
        try:
            compare(name)
        except Exception:
            print(f"{name}: {traceback.format_exc()}", file=sys.stderr, flush=True)
            return False
        return True

    args.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=args.out, prefix="photos-", ignore_cleanup_errors=True) as photos,
        ProcessPoolExecutor(
            args.workers, mp_context=context, initializer=calm, initargs=(threads, Path(photos))
        ) as pool,
        ThreadPoolExecutor(max(1, args.workers // BUSY)) as contenders,
    ):
        try:
            failed = [name for name, ok in zip(args.only, contenders.map(tried, args.only), strict=True) if not ok]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if (args.out / "table.md").exists():
        print((args.out / "table.md").read_text())
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
