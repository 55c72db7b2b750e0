"""Plans the runs of a grid: which there are, what is known of them already, and what is left out and why.

A run is known by what it computes (`record.content`): its folder bears the hash, and its record is compared in full.
What has to be done is read from the folders alone, so that a sweep can be started again at any time, or twice at once.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from s2a_cli import backbones, data
from s2a_cli.backbones.hub import WeightsMissing, cache_alone
from s2a_cli.common.errors import UserError
from s2a_cli.common.progress import Progress
from s2a_cli.common.text import listed, nearest, printable
from s2a_cli.config.compose import compose
from s2a_cli.config.overrides import value_text
from s2a_cli.config.schema import DatasetConfig, SweepConfig
from s2a_cli.config.settings import merge, plain
from s2a_cli.memory.margin import Margin
from s2a_cli.memory.result import MIB
from s2a_cli.methods import keeps_codable
from s2a_cli.planner.batch_size import need_device, resolved
from s2a_cli.planner.run_memory import sizes
from s2a_cli.planner.sizes import AUTO
from s2a_cli.results import record, run_folder
from s2a_cli.sweeps.grid import Chosen, Grid
from s2a_cli.training import forecast
from s2a_cli.training.run import attach

# Settings that the peak depends on.
OF_MEMORY = ("backbone", "method", "quant", "optim", "precision", "compile", "budget", "fidelity", "cuda_graphs")
OF_THE_RATE = ("lr", "epochs", "warmup_epochs", "schedule")  # and those of `optim` that it does not
GROUPS = ("backbone", "method", "quant", "dataset", "optim")


@dataclass
class Member:
    """One run of a grid."""

    words: list[str]  # of `s2a train`
    config: DictConfig
    name: str  # the words in which it differs from others
    content: str  # what it computes, see record.content
    folder: Path
    classes: int
    images: int  # to train on
    known: bool = True  # false: without its data and weights, neither what it computes nor its folder is known
    peak_mib: float | None = None  # predicted, where it was asked for
    needed_mib: float | None = None  # of a GPU, with its context and a margin
    reported: bool = False  # that its record can't be read

    @property
    def command(self) -> list[str]:
        """The words of `s2a train` with its folder."""
        return [*self.words, f"run_dir={value_text(str(self.folder))}"]

    def state(self) -> str:
        """Returns what its folder says: new | done | failed | oom | interrupted | running; or "unknown".

        A record that can't be read is reported on stderr, once.
        """
        if not self.known:
            return "unknown"
        state, damage = run_folder.state(self.folder, self.content)
        if damage and not self.reported:
            print(f"s2a: {printable(damage)}: to be trained anew", file=sys.stderr)
            self.reported = True
        return state


@dataclass
class Plan:
    """The runs of a grid, without those that are left out."""

    members: list[Member]
    excluded: dict[str, list[str]] = field(default_factory=dict)  # why they are not wanted -> names of runs
    unfit: dict[str, list[str]] = field(default_factory=dict)  # why they can't be run -> names of runs
    missing: list[str] = field(default_factory=list)  # data and weights that are not here, a line each
    repeated: int = 0  # members of the grid that are the same run as another
    settings: SweepConfig = field(default_factory=SweepConfig)


def plan(grid: Grid, dry: bool = False) -> Plan:
    """Returns the runs of a grid.

    Their data and weights are read or downloaded, because a run is known by them. dry: what is not here stays away, and
    is named. Raises UserError when no run is left.
    """
    settings = grid.settings
    if any(AUTO in chosen.words for chosen in grid.members):
        _whole_gpus(settings)
    members: dict[str, Member] = {}  # by what each computes
    excluded: dict[str, list[str]] = {}
    unfit: dict[str, list[str]] = {}
    known = Known(dry)
    with Progress("planning", len(grid.members), " runs") as progress:
        for chosen in grid.members:
            try:
                words, config = known.sized(chosen)
                if reason := _excluded(config, settings.exclude):
                    excluded.setdefault(reason, []).append(chosen.name)
                else:
                    member = known.member(words, config, chosen.name, Path(settings.dir))
                    members.setdefault(member.content, member)
            except UserError as error:
                unfit.setdefault(str(error), []).append(chosen.name)
            progress.add(1)
    if not members:
        lines = [line for reason in unfit or excluded for line in reason.splitlines()]
        raise UserError("\n".join(dict.fromkeys(lines)))
    repeated = len(grid.members) - len(members) - sum(map(len, [*excluded.values(), *unfit.values()]))
    return Plan(list(members.values()), excluded, unfit, list(known.missing.values()), repeated, settings)


def _whole_gpus(settings: SweepConfig) -> None:
    """Raises UserError unless each run of a sweep has a GPU of this machine alone, whose memory a batch can fit."""
    if settings.launcher != "local":
        raise UserError(
            f"{AUTO}: under sweep.launcher={settings.launcher} the device is elsewhere; `s2a memory fit=8GiB` tells the"
            " batch for it"
        )
    need_device()
    if settings.pack or (settings.workers or 1) > torch.cuda.device_count():
        raise UserError(
            f"{AUTO}: fills a GPU, and here several runs share one; set sweep.workers to at most the number of GPUs"
        )


def _excluded(config: DictConfig, rules: Iterable[dict[str, Any]]) -> str | None:
    """Returns why a run is left out; None if it is not. Raises UserError for a rule that names no setting."""
    quant, method = config.quant, config.method.name
    only_codes = quant.recompute == "none" and quant.chunks == 1 and quant.name not in ("none", "exact")
    if only_codes and not keeps_codable(method):
        return f"method={method} keeps nothing that quant={quant.name} could code: it is the run with quant=none"
    for rule in rules:
        conditions = {key: value for key, value in rule.items() if key != "why"}
        if not conditions:
            raise UserError(
                f"sweep.exclude: {rule}: expected settings, such as {{method: side, quant: int4, why: a reason}}"
            )
        matches = True
        for key, value in conditions.items():
            found = config[key].name if key in GROUPS else OmegaConf.select(config, key, default="?")
            if found == "?":
                raise UserError(f"sweep.exclude: {key}: no such setting{nearest(key, [*GROUPS, *map(str, config)])}")
            matches &= found in (value if isinstance(value, list) else [value])
        if matches:
            return rule.get("why") or "excluded: " + ", ".join(f"{key}={value}" for key, value in conditions.items())
    return None


class Known:
    """Looks at the data, weights and structures of the runs of a plan, at each once.

    dry: data and weights that are not here are not downloaded; `missing` then says what they are.
    """

    def __init__(self, dry: bool = False) -> None:
        self.dry = dry
        self.missing: dict[str, str] = {}  # name -> a line
        self._data: dict[str, tuple[str | None, str, int, int]] = {}
        self._weights: dict[str, str | None] = {}
        self._fits: set[str] = set()
        self._batches: dict[str, str] = {}

    def sized(self, chosen: Chosen) -> tuple[list[str], DictConfig]:
        """Returns words and config, with optim.batch_size=auto replaced by what fits the first GPU.

        The GPUs of one machine are taken to be alike. A run is known by its batch, which has to be the same number
        whenever the sweep goes on: that of the whole memory of the GPU, whatever others hold of it now. Raises
        UserError for what is no run.
        """
        if chosen.config is None:
            raise UserError(chosen.problem)
        if AUTO not in chosen.words:
            return chosen.words, chosen.config
        alone = [word for word in chosen.words if not word.startswith("busy=")]
        unseeded = merge(compose([word for word in alone if word != AUTO]), {"seed": 0})
        batch = _once(self._batches, unseeded, lambda: resolved(alone)[-1])
        words = [*(word for word in chosen.words if word != AUTO), batch]
        return words, compose(words)

    def member(self, words: list[str], config: DictConfig, name: str, root: Path) -> Member:
        """Returns a run of the grid.

        Raises UserError for data or weights that can't be had, and for settings that don't fit the backbone.
        """
        (revision, label, classes, images), weights = self.origin(config)
        settings = plain(config, resolve=True)
        shape = {key: settings[key] for key in ("backbone", "method", "quant", "optim", "precision")}
        shape = json.dumps(shape | {"cache": settings["dataset"]["cache"]})
        if shape not in self._fits:
            attach(config, backbones.build(config.backbone, classes, meta=True))
            self._fits.add(shape)
        content, known = record.content(settings, revision or "", weights or ""), bool(revision and weights)
        run = record.run_id(content) if known else "?"
        place = root / label / config.backbone.name / config.method.name / run
        return Member(words, config, name, content, place, classes, images, known)

    def origin(self, config: DictConfig) -> tuple[tuple[str | None, str, int, int], str | None]:
        """Returns what a run begins from: the summary of its data and the hash of its weights.

        Raises UserError for what can't be had.
        """
        summary = _once(self._data, config.dataset, lambda: self._summary(config.dataset))
        seed = None if config.backbone.pretrained else config.seed  # which random weights come from
        of_weights = {"of": plain(config, resolve=True)["backbone"], "seed": seed}
        return summary, _once(self._weights, of_weights, lambda: self._fingerprint(config, summary[2]))

    def _summary(self, dataset: DatasetConfig) -> tuple[str | None, str, int, int]:
        """Returns (revision, name, number of classes, number of training images) of a data set.

        Of one that is not here there is no revision, and the numbers are those that it is known to have.
        """
        try:
            chosen: Any = merge(dataset, {"download": False}) if self.dry else dataset
            splits = data.load(chosen)
        except UserError as error:
            if not self.dry or data.problems(dataset):
                raise
            classes, images, assumed = sizes(dataset)
            name = data.title(dataset)
            self.missing[name] = f"the data of {name} ({assumed or str(error).splitlines()[0]})"
            return None, name, classes, images
        return splits.revision, splits.name, len(splits.classes), len(splits.train)

    def _fingerprint(self, config: DictConfig, classes: int) -> str | None:
        """Returns the hash of the weights, which without pretrained ones come from the run's seed; None without any."""
        torch.manual_seed(config.seed)
        try:
            with cache_alone() if self.dry else nullcontext():
                return backbones.build(config.backbone, classes).fingerprint()
        except WeightsMissing:
            if not self.dry:
                raise
            self.missing[config.backbone.timm] = f"the weights of {config.backbone.name} ({config.backbone.timm})"
            return None


def _once(known: dict[str, Any], key: DictConfig | dict[str, Any], make: Callable[[], Any]) -> Any:
    """Returns what is known under the settings of `key`; made when it is first asked for."""
    text = json.dumps(plain(key, resolve=True) if OmegaConf.is_config(key) else key, sort_keys=True)
    if text not in known:
        known[text] = make()
    return known[text]


def predict(members: list[Member]) -> None:
    """Fills in what each run is predicted to need, in MiB; leaves None where that can't be said."""
    known: dict[str, tuple[float, float] | None] = {}

    def of(member: Member) -> tuple[float, float] | None:
        profile = forecast.profile_composition(member.config, member.classes, member.images)
        return (profile.memory.peak_mib, Margin().needed(profile) / MIB) if profile else None

    with Progress("predicting", len(members), " runs") as progress:
        for member in members:
            settings = plain(member.config, resolve=True)
            chosen = {name: settings[name] for name in OF_MEMORY}
            chosen["optim"] = {name: value for name, value in chosen["optim"].items() if name not in OF_THE_RATE}
            batch = min(member.images, member.config.optim.batch_size)
            beside = {"classes": member.classes, "batch": batch, "cache": member.config.dataset.cache}
            if found := _once(known, {**chosen, **beside}, lambda member=member: of(member)):
                member.peak_mib, member.needed_mib = found
            progress.add(1)


def overview(planned: Plan, predicted: bool) -> str:
    """Returns the plan as a table, with the state of each run, and what is left out and why."""
    from tabulate import tabulate

    rows = []
    for member in planned.members:
        peak = "–" if member.peak_mib is None else f"{member.peak_mib:,.0f}"
        rows.append([member.name, member.state(), *([peak] if predicted else []), str(member.folder)])
    header = ["run", "state", *(["predicted peak MiB"] if predicted else []), "folder"]
    counts = Counter(row[1] for row in rows)
    alignment = ["left", "left", *(["right"] if predicted else []), "left"]
    table = tabulate(rows, header, disable_numparse=True, colalign=alignment)
    total = f"\n{len(rows)} runs: " + ", ".join(f"{number} {state}" for state, number in counts.items())
    missing = [f"not on this machine: {what}; a sweep downloads it" for what in planned.missing]
    return "\n".join([table, total, *missing, *left_out(planned)])


def left_out(planned: Plan) -> list[str]:
    """Returns a line for each reason for which members of the grid are not run."""
    lines = []
    for verdict, reasons in (("left out", planned.excluded), ("can't be run", planned.unfit)):
        lines += [f"{verdict}: {listed(names, 3, '; ')}: {why.splitlines()[0]}" for why, names in reasons.items()]
    if planned.repeated:
        lines.append(f"left out: {planned.repeated} that are the same run as another of the grid")
    return lines
