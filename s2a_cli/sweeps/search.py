"""Searches settings for the best validation accuracy; the test split is left alone.

Every trial is a run like those of a sweep: a process of its own, known by what it computes. Optuna proposes the
settings (a tree-structured Parzen estimator, Bergstra et al. 2011) and keeps the trials in a file, so that a search
goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2a_cli import data
from s2a_cli.common.errors import RunError, UserError
from s2a_cli.common.text import brief, nearest
from s2a_cli.config.compose import compose, compose_sweep
from s2a_cli.config.overrides import expand, parsed, steps
from s2a_cli.config.schema import SweepConfig
from s2a_cli.results import record, run_folder
from s2a_cli.sweeps.launchers import Launcher, make_launcher
from s2a_cli.sweeps.planning import Known, Plan
from s2a_cli.sweeps.sweep import Sweep

KEYS = {
    "search.trials": "finished trials to reach",
    "search.name": "of the study; null: after the settings and their ranges",
}
FAILURES = 5  # in a row, at which a search gives up
ENOUGH = 10  # trials from which on the importance of settings is reported
SHOWN = 5  # trials in the table at the end
BEGINNINGS = ("dataset=", "dataset.root=", "backbone=", "backbone.checkpoint=")  # words of what runs begin from
METRIC = "metric"  # attribute of a study: the name of its figure


@dataclass(frozen=True)
class Space:
    """What is searched, and what is the same in all trials."""

    ranges: dict[str, str]  # key -> word in Hydra's grammar
    fixed: list[str]  # words of `s2a train`

    def distributions(self) -> dict[str, Any]:
        """Returns {key: Optuna's distribution of its values}."""
        return {key: _distribution(word) for key, word in self.ranges.items()}

    def words(self, values: dict[str, Any]) -> list[str]:
        """Returns the words of `s2a train` of a trial with these values."""
        return [*self.fixed, *(f"{key}={values[key]}" for key in self.ranges)]

    def text(self) -> str:
        """Returns a text that is the same for equal spaces alone."""
        return json.dumps(sorted([*self.ranges.values(), *self.fixed]))


def _distribution(word: str) -> Any:
    """Returns Optuna's form of an interval, of a range, or of several values, which are kept as they are written."""
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    override: Any = parsed(word)
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        low: Any = value.start
        high: Any = value.end
        log = "log" in value.tags
        if odd := value.tags - {"log"}:
            raise UserError(f"{word}: tag {min(odd)!r} is not known; there is tag(log,interval(1e-4,1e-2))")
        if not low < high or (log and low <= 0):
            raise UserError(
                f"{word}: expected interval(LOW,HIGH) with LOW below HIGH{' and above 0, for log' if log else ''}"
            )
        if not all(map(math.isfinite, (low, high))):
            raise UserError(f"{word}: expected finite numbers")
        return (IntDistribution if isinstance(low, int) else FloatDistribution)(low, high, log=log)
    if isinstance(value, RangeSweep) and not value.shuffle and steps(word, value):
        start, stop, step = value.start, value.stop, value.step
        if isinstance(start, int) and isinstance(stop, int) and isinstance(step, int):
            numbers = range(start, stop, step)
            return IntDistribution(min(numbers), max(numbers), step=abs(step))
    values = [one.partition("=")[2] for (one,) in expand([word])]
    return CategoricalDistribution(values)


def _first(word: str) -> str:
    """Returns the word with the first of its values."""
    from hydra.core.override_parser.types import RangeSweep

    override: Any = parsed(word)
    value = override.value()
    if isinstance(value, RangeSweep) and not value.shuffle and steps(word, value):
        return f"{override.get_key_element()}={next(iter(value.range()))}"
    return expand([word])[0][0]


def _beginnings(space: Space) -> dict[str, list[str]]:
    """Returns the words of a run with the first value of each range, and of one for each other data set or backbone.

    By what is said of them: nothing of the first, ` of dataset=b` of another.
    """
    words = [word for word in space.ranges.values() if "interval(" not in word]
    first = [*space.fixed, *map(_first, words)]
    others = [one for word in words if word.startswith(BEGINNINGS) for (one,) in expand([word])[1:]]
    keys = {one: one.partition("=")[0] + "=" for one in others}
    return {"": first} | {
        f" of {one}": [*(word for word in first if not word.startswith(keys[one])), one] for one in others
    }


class Search:
    """Goes on with a study. seed: of the proposals."""

    def __init__(
        self, study: Any, space: Space, settings: SweepConfig, launcher: Launcher, known: Known, seed: int = 0
    ):
        self.study, self.space, self.settings, self.launcher, self.seed = study, space, settings, launcher, seed
        self.known = known
        self.failures = 0

    def __call__(self, trials: int) -> None:
        """Runs trials until so many are finished; those that were broken off go first."""
        from optuna.trial import TrialState

        broken_off = [trial for trial in self.study.trials if trial.state == TrialState.RUNNING]
        while (left := trials - len(finished(self.study))) > 0:
            together = min(left, self.settings.workers or getattr(self.launcher, "workers", None) or 1)
            proposed, broken_off = broken_off[:together], broken_off[together:]
            self._run(proposed or [self._propose() for _ in range(together)])

    def _propose(self) -> Any:
        """Returns a new trial: the same after the same trials, whether or not the search was broken off in between."""
        self.study.sampler = _sampler(self.seed + len(self.study.trials))
        return self.study.ask(self.space.distributions())

    def _run(self, trials: list[Any]) -> None:
        """Runs some trials at once and tells the study how they ended.

        Raises UserError for settings that can't be, and RunError after FAILURES failed trials in a row.
        """
        from optuna.trial import TrialState

        members = {}
        for trial in trials:
            words = [*self.space.words(trial.params), "test=false"]
            name = f"trial {trial.number}: " + " ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
            try:
                members[trial.number] = self.known.member(words, compose(words), name, Path(self.settings.dir))
            except UserError:
                for other in trials:
                    self.study.tell(other.number, state=TrialState.FAIL, skip_if_finished=True)
                raise
        different = {member.content: member for member in members.values()}
        summary = Sweep(Plan(list(different.values()), settings=self.settings), self.launcher)()
        lines = {member.content: line for member, line in summary.failed}
        for number, member in members.items():
            result, line = record.finished(member.folder, member.content), lines.get(member.content, "left")
            if result:
                headline, line = record.headline(result["accuracy"]), "none of its validation images has a label"
                if headline.val is not None:
                    self.failures = 0
                    self.study.set_user_attr(METRIC, headline.name)
                    self.study.tell(number, headline.val, skip_if_finished=True)
                    continue
            self.failures += 1
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
            if self.failures == FAILURES:
                raise RunError(f"{FAILURES} trials in a row failed; the last: {line}")


def _sampler(seed: int) -> Any:
    """Returns the sampler that proposes settings, without Optuna's warning that an option of it is experimental."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def finished(study: Any) -> list[Any]:
    """Returns the trials of a study that have a value, the best first."""
    from optuna.trial import TrialState

    return sorted(
        (trial for trial in study.trials if trial.state == TrialState.COMPLETE), key=lambda trial: -trial.value
    )


def open_study(folder: Path, name: str, space: Space, origin: dict[str, str]) -> Any:
    """Opens the study in `folder`, new or as it was left. Raises UserError where it is one over something else.

    origin: what its runs begin from -> the hash of that.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = run_folder.make_run_dir(folder) / f"{name}.db"
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{path}", study_name=name, direction="maximize", load_if_exists=True
        )
    except Exception as error:  # what the database says about a file that is not one
        raise UserError(
            f"{path}: can't be used as a study ({str(error).splitlines()[0]}); remove it, or set search.name="
        ) from None
    there = study.user_attrs.get("space")
    if there is None:
        study.set_user_attr("space", space.text())
    elif there != space.text():
        changed = min(set(json.loads(there)) ^ set(json.loads(space.text())))
        raise UserError(
            f"{path}: a search over something else ({changed} is in one of them only); set search.name= to another name"
        )
    known = study.user_attrs.get("origin", {})
    if changed := [what for what, now in origin.items() if known.get(what, now) != now]:
        raise UserError(
            f"{path}: a search over something else ({changed[0]} changed since); set search.name= to another name"
        )
    study.set_user_attr("origin", origin)
    return study


def read(words: list[str]) -> tuple[Space, int, str | None, SweepConfig]:
    """Returns what the words of `s2a search` say: space, trials, the study's name, and how runs are started.

    Raises UserError for words that can't be read, and when nothing is to be searched.
    """
    own: dict[str, str] = {}
    ranges: dict[str, str] = {}
    fixed: list[str] = []
    sweep: list[str] = []
    for word in words:
        key, _, value = word.removeprefix("++").partition("=")
        override = parsed(word)
        if key.startswith("search."):
            if key not in KEYS:
                raise UserError(f"{key}: no such setting; accepted: {', '.join(KEYS)}{nearest(key, KEYS)}")
            own[key] = value
        elif key.startswith("sweep."):
            sweep.append(word)
        elif key == "test":
            raise UserError(f"{word}: a search leaves the test split alone; train with the best settings to test them")
        elif override is not None and override.is_sweep_override():
            ranges[key] = word
        else:
            fixed.append(word)
    trials = own.get("search.trials", "20")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", trials):
        raise UserError(f"search.trials={brief(trials)}: expected an integer of at least 1, at most 999999")
    name = own.get("search.name")
    if name is not None and not re.fullmatch(r"[\w-]{1,100}", name):
        raise UserError(f"search.name={brief(name)}: expected letters, digits, - and _, at most 100 of them")
    if not ranges:
        raise UserError(
            "nothing to search: give a setting a range: optim.lr=tag(log,interval(1e-4,1e-2)) or quant=none,int4"
        )
    settings = compose_sweep([*(word for word in fixed if word.startswith("experiment=")), *sweep])
    return Space(ranges, fixed), int(trials), name, settings


def search(words: list[str]) -> int:
    """Goes on with a study for `s2a search` and prints its best trials. Returns the exit code."""
    space, trials, name, settings = read(words)
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError("s2a search needs a package that is not here: pip install 's2a[optuna]'") from None
    space.distributions()
    configs = {about: compose(words) for about, words in _beginnings(space).items()}
    for config in configs.values():
        if not len(data.load(config.dataset).val):
            raise UserError(
                f"dataset={config.dataset.name}: no image is left for validation, by which a search chooses"
            )
    called = hashlib.sha256(space.text().encode()).hexdigest()[:8]
    known, config, origin = Known(), configs[""], {}
    for about, one in configs.items():
        (revision, *_), weights = known.origin(one)
        origin |= {f"the data{about}": str(revision), f"the weights{about}": str(weights)}
    name = name or f"{config.dataset.name}-{config.method.name}-{called}"
    study = open_study(Path(settings.dir) / "search", name, space, origin)
    if done := finished(study):
        print(f"s2a: going on with {len(done)} finished trials of {study.study_name}", file=sys.stderr)
    launcher = make_launcher(settings, [config.device])
    try:
        Search(study, space, settings, launcher, known)(trials)
    finally:
        launcher.close()
        print(overview(study, space))
    return 0


def overview(study: Any, space: Space) -> str:
    """Returns the best trials as a table, what mattered, and the line that trains and tests the best one."""
    from tabulate import tabulate

    best = finished(study)
    if not best:
        return "no trial is finished"
    rows = [
        [trial.number, *(_short(trial.params[key]) for key in space.ranges), f"{trial.value:.2f}"]
        for trial in best[:SHOWN]
    ]
    failed = sum(trial.state.name == "FAIL" for trial in study.trials)
    metric = study.user_attrs.get(METRIC, "top-1")
    lines = [tabulate(rows, ["trial", *space.ranges, f"val {metric} %"], disable_numparse=True), ""]
    broken = f"; {failed} failed" if failed else ""
    lines.append(f"best {len(rows)} of {len(best)} finished trials{broken}, by validation {metric}")
    if len(best) >= ENOUGH and (shares := _importance(study)):
        lines.append("importance (fANOVA): " + ", ".join(f"{key} {100 * share:.0f} %" for key, share in shares.items()))
    return "\n".join([*lines, "", f"s2a train {shlex.join([*space.words(best[0].params), 'test=true'])}"])


def _importance(study: Any) -> dict[str, float]:
    """Returns {setting: share of the variance of the figure that it explains}; empty where all trials ended alike."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    try:
        return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    except (RuntimeError, ValueError):
        return {}


def _short(value: Any) -> str:
    """Returns a value as tables show it, numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
