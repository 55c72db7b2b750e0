"""What `s2a` can do: a command is one entry in COMMANDS. Only commands that need torch import it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2a_cli.cli import beginning, finished, listing
from s2a_cli.cli.deferred import imports
from s2a_cli.cli.listing import KINDS
from s2a_cli.common.errors import UserError
from s2a_cli.common.files import is_there
from s2a_cli.common.text import brief

OVERWRITE = {"--force": "overwrite a file that s2a did not make"}


@dataclass(frozen=True)
class Command:
    """A command of `s2a`: what it runs, and what its help and the shell completion say about it."""

    run: Callable[[list[str]], int]  # takes the words behind the command and returns the exit code
    usage: str
    about: str
    examples: tuple[str, str, str]
    words: tuple[str, ...] = ()  # completed as they stand
    config: Callable[[list[str]], Any] | None = None  # what `--cfg job` prints; its settings are completed as well
    flags: dict[str, str] = field(default_factory=dict)  # {--flag: meaning}, handed on to `run` among the words


def composed(words: list[str]) -> Any:
    """Returns the config that the words compose; raises UserError with all that is wrong with them."""
    from s2a_cli.config.compose import compose

    return compose(words)


def train(words: list[str]) -> int:
    """Trains one run and prints its table; returns 0, 1 for a run that failed or 130 for one that was interrupted."""
    if "optim.batch_size=auto" in words:
        from s2a_cli.planner.batch_size import resolved

        words = resolved(words)
    config = composed([word for word in words if not word.startswith("--")])
    from s2a_cli.config.paths import check_paths

    check_paths(config)
    if config.run_dir:
        from s2a_cli.results.run_folder import check_run_dir

        check_run_dir(Path(config.run_dir))
    if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun the first alone speaks
        print(f"{_headline(config)}, seed {config.seed}", flush=True)
    with imports():
        from s2a_cli.common.distributed import silenced
        from s2a_cli.results import aggregate, summary
        from s2a_cli.training import trainer

    with silenced():
        flags = {"force": "--force" in words, "skip_finished": "--once" in words}
        result, folder = trainer.train(config, **flags, planner=_planner(config))
        print(summary.render(summary.table(aggregate.from_results([result]))))
        print(f"\nrun: {folder}")
    status, error = result["status"], result["error"]
    if status != "ok":
        print(f"s2a: {status}: {error if error != status else 'the same line goes on from there'}", file=sys.stderr)
    return 0 if status == "ok" else 130 if error == "interrupted" else 1


def _planner(config: Any) -> Callable[[Any], Any] | None:
    """Returns what plans a run with a budget; None for one without."""
    if not config.budget:
        return None
    with imports():
        from s2a_cli.planner.run_plan import plan_run
    return plan_run


def plan(words: list[str]) -> int:
    """Prints how `s2a train` with the same words would run, and trains nothing."""
    config = composed(words)
    if not config.budget:
        raise UserError("budget=SIZE is needed: the memory that a step may take, such as budget=6GiB")
    with imports():
        from s2a_cli.planner.run_plan import plan_run
        from s2a_cli.results.plan_text import render
        from s2a_cli.training.run import prepare

    print(render(plan_run(prepare(config))))
    return 0


def first_of_grid(words: list[str]) -> Any:
    """Returns the config of the first run of a grid."""
    from s2a_cli.config.overrides import expand

    return composed(expand([word for word in words if not word.startswith("sweep.")])[0])


def sweep(words: list[str]) -> int:
    """Runs a grid."""
    from s2a_cli.sweeps.grid import read_grid

    grid = read_grid([word for word in words if not word.startswith("--")])
    with imports():
        from s2a_cli.sweeps import sweep as sweeps

    return sweeps.sweep(grid, [word for word in words if word.startswith("--")])


def search(words: list[str]) -> int:
    """Looks for the settings with the best validation accuracy."""
    with imports():
        from s2a_cli.sweeps import search

    return search.search(words)


def validate(words: list[str]) -> int:
    """Checks a config and prints its main settings in a line."""
    from omegaconf import OmegaConf

    config = composed(words)
    keys = ("optim.lr", "optim.epochs", "optim.batch_size", "precision", "seed")
    print("ok:", _headline(config), *(f"{key}={OmegaConf.select(config, key)}" for key in keys))
    return 0


def _headline(config: Any) -> str:
    """Returns the groups of a config with what was chosen of each; a budget chooses quant itself."""
    names = {group: config[group].name for group in ("backbone", "method", "quant", "dataset", "optim")}
    if config.budget:
        names["quant"] = f"planned budget={config.budget}"
    return " ".join(f"{group}={name}" for group, name in names.items())


# The options of `table`; other words choose runs.
TABLE = ("rows", "cols", "value", "format", "against", "groups", "reference", "figure")


def _runs(words: list[str], names: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Splits words into options, what runs must have (dataset=pets), and the folders that hold runs."""
    words = [word for word in words if word != "--force"]
    folders = [word for word in words if "=" not in word or is_there(Path(word))]
    if odd := next((word for word in folders if not is_there(Path(word))), None):
        raise UserError(
            f"{brief(odd)}: no such folder; name the folders that hold runs, or key=value to choose among them"
        )
    pairs = dict(word.split("=", 1) for word in words if word not in folders)
    if not folders and not Path("runs").is_dir():
        raise UserError("no runs/ in this folder; name the folders that hold runs, or make a run with: s2a train")
    options = {key: value for key, value in pairs.items() if key in names}
    return options, {key: value for key, value in pairs.items() if key not in names}, folders or ["runs"]


def table(words: list[str]) -> int:
    """Prints a table of runs, and draws it where a figure is asked for."""
    from s2a_cli.results import aggregate, formats, pivot_text, summary

    options, wanted, folders = _runs(words, TABLE)
    formats.check_format(options.get("format", "terminal"))
    frame = aggregate.select(aggregate.load(folders), wanted, TABLE)
    shown = pivot_text.show(frame, options)
    if "figure" in options:
        from s2a_cli.results import plots

        plots.save(summary.table(frame), Path(options["figure"]), "--force" in words)
    print(shown)
    return 0


def report(words: list[str]) -> int:
    """Writes the HTML page of runs, or of the one behind `run=`, and prints where it is."""
    if any(word.startswith("run=") for word in words):
        return finished.report(words)
    from s2a_cli.results import html_report

    options, wanted, folders = _runs(words, ("out",))
    out = Path(options.get("out", "report.html"))
    print(html_report.write(folders, wanted, out, "--force" in words))
    return 0


def memory(words: list[str]) -> int:
    """Prints the predicted memory of runs."""
    from s2a_cli.planner.request import read_request

    asked = read_request(words)
    with imports():
        from s2a_cli.planner import command

    return command.run(asked)


def first_of_memory(words: list[str]) -> Any:
    """Returns the config of the first composition of `s2a memory`."""
    from s2a_cli.planner.request import OPTIONS

    return first_of_grid([word for word in words if word.partition("=")[0] not in OPTIONS])


COMMANDS = {
    "init": Command(
        beginning.init,
        "s2a init FOLDER [out=photos.yaml] [minutes=20] [key=value ...]",
        "look at your photos and write a short config for them: backbone, image size, epochs that suit this machine",
        (
            "s2a init photos",
            "s2a init photos out=first.yaml minutes=60",
            "s2a init photos backbone=vit_t backbone.checkpoint=vit_tiny.safetensors --force",
        ),
        words=("out=", "minutes="),
        flags=OVERWRITE,
    ),
    "train": Command(
        train,
        "s2a train [key=value ...]",
        "train one run and print its table; one that was broken off goes on, one that is finished is shown",
        (
            "s2a train",
            "s2a train backbone=vit_b method=s2a dataset=folder dataset.root=photos",
            "s2a train dataset=cifar10 backbone=vit_t method.prompt.rank=4 method.blocks=last:6 quant=int8 seed=1",
        ),
        words=("config=",),
        config=composed,
        flags={
            "--force": "from the start, even if the run is finished or could go on, and over another run in run_dir",
            "--once": "not if the run is finished: as without, and said before a busy GPU is",
        },
    ),
    "sweep": Command(
        sweep,
        "s2a sweep [key=value,value ...] [sweep.KEY=value ...]",
        "a grid of runs, each in a process of its own; finished ones are skipped, broken ones go on",
        (
            "s2a sweep method=linear,bias,s2a 'seed=range(0,3)'",
            "s2a sweep backbone=vit_b,swin_b 'method=glob(*)' quant=none,int4 dataset=cifar100,pets --dry-run",
            "s2a sweep experiment=photos_112 dataset.root=photos method=bias,s2a optim.lr=2e-3,4e-3 sweep.workers=2",
        ),
        config=first_of_grid,
        flags={
            "--dry-run": "print the runs, their predicted peaks and what is already there",
            "--retry-failed": "also those that failed before",
            "--force": "also those that are finished",
            "--fail-fast": "begin no more runs after the first that fails",
        },
    ),
    "search": Command(
        search,
        "s2a search [key=interval(LOW,HIGH) ...] [search.trials=N] [search.name=NAME] [sweep.KEY=value ...]",
        "look for the settings with the best validation accuracy; the same line again goes on",
        (
            "s2a search method=bias 'optim.lr=tag(log,interval(1e-3,1e-1))' optim.epochs=2 search.trials=10",
            (
                "s2a search 'optim.lr=tag(log,interval(1e-4,1e-2))' 'optim.weight_decay=choice(0,1e-4)'"
                " 'method.prompt.rank=range(2,17,2)'"
            ),
            (
                "s2a search experiment=photos_112 dataset.root=photos quant=int4,tiny 'optim.mixup=interval(0,1)'"
                " search.trials=30"
            ),
        ),
        words=("search.trials=", "search.name=", "sweep.workers=", "sweep.dir="),
    ),
    "plan": Command(
        plan,
        "s2a plan budget=SIZE [fidelity=exact|0.999|0.99] [key=value ...]",
        "find the fastest way to train a run in a memory budget, measured on this device, and print it; train nothing",
        (
            "s2a plan budget=16MiB",
            "s2a plan backbone=vit_b dataset=folder dataset.root=photos budget=6GiB",
            "s2a plan backbone=vit_b dataset=folder dataset.root=photos budget=400MiB fidelity=0.999",
        ),
        config=composed,
    ),
    "memory": Command(
        memory,
        "s2a memory [key=value,value ...] [fit=8GiB] [devices=4GiB,8GiB] [context=600MiB] [fragmentation=5%]"
        " [expandable_segments=true] [processes=N] [snapshot=FILE] [figure=FILE.svg] [format=terminal|json|csv]",
        "predict the peak memory of runs and where it is, without a GPU, weights or images; what fits a device",
        (
            "s2a memory backbone=vit_b method=s2a dataset=cifar100 optim.batch_size=64",
            "s2a memory backbone=vit_b method=full,linear,bias,s2a quant=none,int4 figure=memory.svg",
            "s2a memory backbone=vit_b,vit_l method=s2a devices=4GiB,6GiB,8GiB,12GiB,24GiB",
        ),
        words=(
            *("figure=", "fit=", "devices=", "context=", "fragmentation=", "expandable_segments=", "processes="),
            "snapshot=",
            *("format=terminal", "format=json", "format=csv"),
        ),
        config=first_of_memory,
        flags=OVERWRITE,
    ),
    "predict": Command(
        finished.predict,
        "s2a predict run=DIR images=FILE|FOLDER|PATTERN ... [top=5] [out=FILE.csv|FILE.json] [gallery=FILE.html]"
        " [key=value ...]",
        "classify photos with a finished run: classes and probabilities; a page of thumbnails, the least certain first",
        (
            "s2a predict run=runs/pets/vit_b/s2a/0123456789ab images=photo.jpg",
            "s2a predict run=runs/pets/vit_b/s2a/0123456789ab images=photos top=3 out=predictions.csv",
            "s2a predict run=runs/pets/vit_b/s2a/0123456789ab images='photos/*.jpg' gallery=page.html device=cpu",
        ),
        words=("run=", "images=", "top=", "out=", "gallery="),
        config=finished.of_predict,
        flags=OVERWRITE,
    ),
    "eval": Command(
        finished.evaluate,
        "s2a eval run=DIR [data=FOLDER | dataset=NAME dataset.KEY=value ...] [out=FOLDER] [key=value ...]",
        "test a finished run, again on its own test split or on other labelled photos: accuracy by class, confusions",
        (
            "s2a eval run=runs/pets/vit_t/s2a/0123456789ab",
            "s2a eval run=runs/pets/vit_t/s2a/0123456789ab data=photos_of_2027 out=evaluation_2027",
            "s2a eval run=runs/pets/vit_t/s2a/0123456789ab dataset.root=/data/pets workers=2 device=cpu",
        ),
        words=("run=", "data=", "out="),
        config=finished.of_eval,
        flags={"--force": "also into a folder that holds other files"},
    ),
    "export": Command(
        finished.export,
        "s2a export run=DIR out=PATH [to=timm|safetensors|onnx|torchscript|torch-export] [images=FOLDER]"
        " [key=value ...]",
        "write the model of a finished run for others, who need no s2a, and check it on photos",
        (
            "s2a export run=runs/pets/vit_b/lora/0123456789ab out=pets_model",
            "s2a export run=runs/pets/vit_b/s2a/0123456789ab out=pets.onnx to=onnx",
            "s2a export run=runs/pets/vit_b/s2a/0123456789ab out=pets.pt2 to=torch-export images=photos --force",
        ),
        words=("run=", "out=", "to=timm", "to=safetensors", "to=onnx", "to=torchscript", "to=torch-export", "images="),
        config=finished.of_export,
        flags={"--force": "replace an earlier export"},
    ),
    "ls": Command(
        listing.ls,
        f"s2a ls [{'|'.join(KINDS)}]",
        "what there is, a line each",
        ("s2a ls", "s2a ls backbones", "s2a ls methods datasets"),
        words=tuple(KINDS),
    ),
    "validate": Command(
        validate,
        "s2a validate [key=value ...]",
        "check a config and report all its errors; train nothing",
        (
            "s2a validate",
            "s2a validate backbone=swin_t method=bias quant.norm=8",
            "s2a validate experiment=small_gpu dataset.root=photos",
        ),
        config=composed,
    ),
    "table": Command(
        table,
        "s2a table [DIR ...] [rows=KEYS] [cols=KEYS] [value=NAME] [against=published] [reference=ROW] [groups=vtab]"
        " [figure=FILE.svg] [format=terminal|md|csv|latex|html] [key=value ...]",
        "tables of the runs below folders, runs/ by default; key=value keeps the runs that have it",
        (
            "s2a table",
            "s2a table runs rows=method cols=dataset value=test_top1 against=published format=md",
            "s2a table runs rows=quant cols=dataset reference=none method=bias",
        ),
        words=(
            *(f"{word}=" for word in TABLE if word != "format"),
            *("format=terminal", "format=md", "format=csv", "format=latex", "format=html"),
        ),
        flags=OVERWRITE,
    ),
    "report": Command(
        report,
        "s2a report [DIR ...] [out=report.html] [key=value ...], or run=DIR",
        "one page of the runs below folders, or of one run: curves, confusions, memory, its mistakes as pictures",
        (
            "s2a report runs backbone=vit_t",
            "s2a report runs/pets runs/dtd out=pets_dtd.html",
            "s2a report run=runs/pets/vit_t/s2a/0123456789ab",
        ),
        words=("run=", "out="),
        flags=OVERWRITE,
    ),
}
