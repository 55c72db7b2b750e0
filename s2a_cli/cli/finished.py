"""The commands that take a finished run: `run=DIR`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from s2a_cli.cli.deferred import imports
from s2a_cli.common.errors import UserError


def _finished(words: list[str]) -> tuple[Path, list[str]]:
    """Returns the folder behind `run=`, and the other words. Raises UserError unless there is exactly one."""
    folders = [word.removeprefix("run=") for word in words if word.startswith("run=")]
    if len(folders) != 1 or not folders[0]:
        raise UserError("run=DIR is needed once: the folder of a finished run, which `s2a train` prints")
    from s2a_cli.results.run_folder import settle

    with suppress(OSError):  # on a read-only disk
        settle(Path(folders[0]))
    return Path(folders[0]), [word for word in words if not word.startswith("run=")]


def recomposed(words: list[str]) -> Any:
    """Returns the config of the run behind `run=`, with the changes that the other words ask for."""
    from s2a_cli.results import record

    folder, overrides = _finished(words)
    stored = record.read_result(folder)["config"]
    with imports():
        import s2a_cli.methods  # noqa: F401
    from s2a_cli.config.compose import recompose

    return recompose(stored, overrides)


def evaluate(words: list[str]) -> int:
    """Tests a finished run again; returns 1 where a figure differs from the recorded one."""
    config = recomposed(words)
    from s2a_cli.results import record
    from s2a_cli.training import evaluation

    folder, _ = _finished(words)
    scores = evaluation.evaluate(config, folder)
    result = record.read_result(folder)
    if result["status"] != "ok":
        print(f"the run ended as {result['status']}: there is no recorded figure to compare with")
        print(
            *(f"test_{name}: {value} %" for name, value in scores.items() if name != "loss" and value is not None),
            sep="\n",
        )
        return 0
    recorded: Any = result["accuracy"]
    equal = True
    for name in ("top1", "top5"):
        now, then = scores[name], recorded[f"test_{name}"]
        if now is not None or then is not None:
            equal &= now == then
            print(f"test_{name}: {now} %, recorded {then} %: {'equal' if now == then else 'NOT EQUAL'}")
    return 0 if equal else 1


def of_export(words: list[str]) -> Any:
    """Returns the config of the run that `s2a export` writes."""
    return recomposed([word for word in words if not word.startswith("out=")])


def export(words: list[str]) -> int:
    """Writes the model of a finished run as plain weights."""
    force, words = "--force" in words, [word for word in words if word != "--force"]
    outs = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    if len(outs) != 1 or not outs[0]:
        raise UserError("out=FOLDER is needed once: where the model goes")
    config = of_export(words)
    from s2a_cli.training import export as exporting

    folder, _ = _finished(words)
    difference = exporting.export(config, folder, Path(outs[0]), force)
    print(f"{outs[0]}: plain weights; the largest difference from the run's logits is {difference:.1e} of the largest")
    print(f'timm.create_model("local-dir:{outs[0]}", pretrained=True) makes the model, without s2a')
    return 0
