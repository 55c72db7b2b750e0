"""The commands that take a finished run: `run=DIR`."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from s2a_cli.cli.deferred import imports
from s2a_cli.cli.options import OF_TRAINING, check_keys, options_of
from s2a_cli.common.errors import UserError
from s2a_cli.common.files import is_there
from s2a_cli.common.text import counted, listed, printable


def _finished(words: list[str]) -> tuple[Path, list[str]]:
    """Returns the folder behind `run=`, and the other words. Raises UserError unless there is exactly one."""
    folders = [word.removeprefix("run=") for word in words if word.startswith("run=")]
    if len(folders) != 1 or not folders[0]:
        raise UserError("run=DIR is needed once: the folder of a finished run, which `s2a train` prints")
    from s2a_cli.results.run_folder import settle

    with suppress(OSError):  # on a read-only disk
        settle(Path(folders[0]))
    return Path(folders[0]), [word for word in words if not word.startswith("run=")]


def _asked(words: list[str], *names: str) -> tuple[bool, dict[str, str], list[str]]:
    """Returns whether --force is among the words, the options of these names, and the other words."""
    return "--force" in words, *options_of([word for word in words if word != "--force"], *names)


def recomposed(words: list[str]) -> Any:
    """Returns the config of the run behind `run=`, with the changes that the other words ask for."""
    from s2a_cli.results import record

    folder, overrides = _finished(words)
    stored = record.read_result(folder)["config"]
    from s2a_cli.config.compose import recompose

    return recompose(stored, overrides)


def of_eval(words: list[str]) -> Any:
    """Returns the config of the run that `s2a eval` tests."""
    options, words = options_of(words, "data", "out")
    return recomposed(_data(words, options.get("data"))[1])


def _data(words: list[str], root: str | None) -> tuple[list[str], list[str]]:
    """Returns the words about other data to test on, and those about the run.

    root: the folder behind data=. Settings of the data are about the run, unless the words say dataset=. Raises
    UserError for two kinds of other data.
    """
    if not any(word.startswith("dataset=") for word in words):
        from s2a_cli.config.overrides import value_text

        other = ["dataset=folder", f"dataset.root={value_text(root)}", "dataset.on_corrupt=skip"] if root else []
        return other, words
    if root:
        raise UserError("data= and dataset= both name the data to test on: give one of them")
    other = [word for word in words if word.startswith(("dataset=", "dataset."))]
    return other, [word for word in words if word not in other]


def evaluate(words: list[str]) -> int:
    """Tests a finished run; returns 1 where a figure on its own test split differs from the recorded one."""
    force, options, words = _asked(words, "data", "out")
    out = Path(options["out"]) if "out" in options else None
    elsewhere, own = _data(words, options.get("data"))
    what, unused = ("eval on other data", ("dataset.",)) if elsewhere else ("eval", ())
    check_keys(what, own, ("run", "data", "dataset", "out"), (*OF_TRAINING, *unused, "test"))
    folder, _ = _finished(own)
    config = recomposed(own)
    from s2a_cli.config.compose import compose
    from s2a_cli.config.paths import check_paths

    other = compose(elsewhere) if elsewhere else None
    check_paths(other or config)
    with imports():
        from s2a_cli.results import evaluation, multi_label, record
        from s2a_cli.training import testing
        from s2a_cli.training.trained import load_as

    if out:
        evaluation.check_out(out, force)
    dataset = other.dataset if other else None
    recorded = record.read_result(folder)
    labelled = testing.elsewhere(recorded["data"], dataset) if dataset else testing.own_test(folder, config)
    found = testing.evaluate(load_as(folder, config), labelled)
    figures = found.figures()
    print((multi_label if "map" in figures else evaluation).text(figures))
    name = evaluation.folder_name(labelled.name, labelled.revision) if dataset else "evaluation"
    print(_written(out or folder / name, found, figures, bool(out)))
    return _compared(figures, recorded) if labelled.same else 0


def _written(folder: Path, found: Any, figures: dict[str, Any], asked: bool) -> str:
    """Writes an evaluation to a folder; returns a line that says so, or why it can't be there unless it was asked."""
    from s2a_cli.results import evaluation, multi_label

    write: Any = multi_label.write if "map" in figures else evaluation.write
    try:
        return f"\n{folder}: {listed([path.name for path in write(folder, found, figures)])}"
    except OSError as error:
        if asked:
            raise UserError(f"out={folder}: can't be written to ({error.strerror})") from None
        return f"\nnot written, as nothing can be written to {folder} ({error.strerror}): set out=FOLDER"


def _compared(figures: dict[str, Any], recorded: Any) -> int:
    """Prints whether figures are those of the record; returns 1 where one is not."""
    if recorded["status"] != "ok":
        print(f"the run ended as {recorded['status']}: there is no recorded figure to compare with")
    equal = True
    for name in ("top1", "top5", "balanced", "map"):
        now, then = figures.get(name), recorded["accuracy"][f"test_{name}"]
        if then is not None:
            equal &= now == then
            print(f"test_{name}: {now} %, recorded {then} %: {'equal' if now == then else 'NOT EQUAL'}")
    return 0 if equal else 1


PREDICT = ("top", "out", "gallery")  # options of `s2a predict`, beside run= and images=


def _photos(words: list[str]) -> tuple[list[str], list[str]]:
    """Returns the words that name photos, behind images= or as they stand, and the others."""
    named = [word for word in words if "=" not in word or word.startswith("images=") or is_there(Path(word))]
    return [word.removeprefix("images=") for word in named], [word for word in words if word not in named]


def of_predict(words: list[str]) -> Any:
    """Returns the config of the run that `s2a predict` uses."""
    return recomposed(_photos(options_of(words, *PREDICT)[1])[1])


def predict(words: list[str]) -> int:
    """Classifies photos with a finished run; returns 1 where one of them can't be read."""
    force, options, words = _asked(words, *PREDICT)
    named, words = _photos(words)
    check_keys("predict", words, ("run", "images", *PREDICT), (*OF_TRAINING, "dataset.", "test"))
    folder, _ = _finished(words)
    if not named or "" in named:
        raise UserError("images=FILES, a folder or a pattern is needed: the photos to classify")
    if not options.get("top", "5").isdecimal() or not int(options.get("top", "5")):
        raise UserError(f"top={options['top']}: expected an integer of at least 1")
    from s2a_cli.config.paths import check_photos
    from s2a_cli.results import made_files, predictions

    out, gallery = (Path(options[name]) if name in options else None for name in ("out", "gallery"))
    if out:
        predictions.check_out(out, force)
    if gallery:
        made_files.check_page(gallery, "gallery", force)
    config = recomposed(words)
    check_photos(named)
    with imports():
        from s2a_cli.common.progress import Progress
        from s2a_cli.data import photos
        from s2a_cli.training import prediction
        from s2a_cli.training.trained import load_as

    paths = photos.find(named)
    trained = load_as(folder, config)
    top, page = min(int(options.get("top", "5")), len(trained.classes)), predictions.Gallery() if gallery else None
    unreadable = 0
    with (
        predictions.writer(out, top) as made,
        Progress("predicting", len(paths), " photos", quiet=out is None) as progress,
    ):
        for said in prediction.predict(trained, paths, top, thumbnails=bool(gallery)):
            if said.trouble:
                unreadable += 1
                progress.warn(f"s2a: {printable(said.path)}: can't be read ({said.trouble})")
            made.add(said)
            if page:
                page.add(said)
            progress.add(1)
        seconds = progress.seconds
    if page and gallery:
        page.save(gallery, f"{counted(len(paths), 'photo')} by {folder}", force)
    failed = f", {unreadable} can't be read" if unreadable else ""
    written = f": {listed([path for path in (out, gallery) if path])}" if out or gallery else ""
    print(
        f"{counted(len(paths), 'photo')} in {seconds:.1f} s, {len(paths) / seconds:.1f} a second{failed}{written}",
        file=sys.stdout if out else sys.stderr,
    )
    return 1 if unreadable else 0


EXPORT = ("to", "out")  # options of `s2a export`


def report(words: list[str]) -> int:
    """Writes the page of one run and prints where it is."""
    force, options, words = _asked(words, "out")
    check_keys("report", words, ("run", "out"), OF_TRAINING)
    folder, _ = _finished(words)
    out = Path(options.get("out", folder / "report.html"))
    from s2a_cli.results import made_files, record

    result, config = record.read_result(folder), recomposed(words)
    made_files.check_page(out, "out", force)
    from s2a_cli.config.compose import recompose
    from s2a_cli.config.words import command, words_of
    from s2a_cli.results import run_report
    from s2a_cli.training import reporting

    own = recompose(record.asked(result), [])  # a budget's choices are left to its plan
    own.dataset.download = result["config"]["dataset"].get("download", True)
    again = words_of(own)
    uses = reporting.uses(config, result)
    tested, untested = reporting.tested(folder, config)
    page = run_report.html(folder, result, command(again) if again else None, tested, untested, uses)
    made_files.save(out, page, "out", force)
    print(f"{out}: {len(page.encode()) / 2**20:.1f} MiB{f'. {untested}' if untested else ''}")
    return 0


def of_export(words: list[str]) -> Any:
    """Returns the config of the run that `s2a export` writes."""
    return recomposed(_photos(options_of(words, *EXPORT)[1])[1])


def export(words: list[str]) -> int:
    """Writes the model of a finished run in a form that others load without this package."""
    force, options, words = _asked(words, *EXPORT)
    images, words = _photos(words)
    what, unused = ("export with images=", ("dataset.",)) if images else ("export", ())
    check_keys(what, words, ("run", "images", *EXPORT), (*OF_TRAINING, *unused, "test", "device"))
    folder, _ = _finished(words)
    if "out" not in options:
        raise UserError("out=PATH is needed: where the model goes")
    from s2a_cli.config.paths import check_photos
    from s2a_cli.results import export_files

    out, to = Path(options["out"]), options.get("to", "timm")
    export_files.check(to, out, force)
    config = recomposed([*words, "device=cpu"])
    check_photos(images)
    with imports():
        from s2a_cli.training import export as exporting

    made = exporting.export(config, folder, out, to, images, force)
    print(f"{out}: {listed([path.name for path in made.files])}")
    print(
        f"loaded again: its logits on {counted(made.photos, 'photo')} differ from the run's by at most"
        f" {made.difference:.1e} of the largest"
    )
    print(*(f"  {line}" for line in made.use.splitlines()), sep="\n")
    return 0
