"""A grid of runs, each in a process of its own: what is finished is skipped, what was broken off goes on.

A run is known by what it computes (`records.content`): its folder bears the hash, and its record is compared in full.
What has to be done is read from the folders alone, so that a sweep can be started again at any time, or twice at once.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from s2a_cli import backbones, data
from s2a_cli.common.errors import UserError
from s2a_cli.common.progress import Progress
from s2a_cli.common.text import duration, first_line, listed, nearest, printable
from s2a_cli.config.compose import compose, compose_sweep
from s2a_cli.config.overrides import expand
from s2a_cli.config.schema import SweepConfig
from s2a_cli.methods import keeps_codable
from s2a_cli.planner.batch_size import AUTO, need_device, resolved
from s2a_cli.results import record, run_folder
from s2a_cli.results.formats import check_out
from s2a_cli.sweeps.launchers import Engine, Job, engine
from s2a_cli.training import forecast
from s2a_cli.training import run as run_module

GROUPS = ("backbone", "method", "quant", "dataset", "optim")
LOG = "log.txt"  # in a run's folder: what it said, over all its attempts
POLL = 0.2  # seconds


@dataclass
class Member:
    """One run of a grid."""

    words: list[str]  # of `s2a train`
    config: DictConfig
    name: str  # the words in which it differs from others
    content: str  # see records.content
    folder: Path
    classes: int
    images: int  # to train on
    peak_mib: float | None = None  # predicted, where it was asked for
    told: bool = False  # that its record can't be read

    @property
    def command(self) -> list[str]:
        return [*self.words, f"run_dir={self.folder}"]

    def state(self) -> str:
        """new | done | failed | oom | interrupted | running, as its folder says; a record that can't be read is named
        on stderr.
        """
        state, damage = run_folder.state(self.folder, self.content)
        if damage and not self.told:
            print(f"s2a: {printable(damage)}: to be trained anew", file=sys.stderr)
            self.told = True
        return state


@dataclass
class Plan:
    members: list[Member]
    excluded: dict[str, list[str]] = field(default_factory=dict)  # reason -> names of runs
    repeated: int = 0  # members of the grid that are the same run as another
    settings: SweepConfig = field(default_factory=SweepConfig)


def plan(words: list[str]) -> Plan:
    """The runs that the words of `s2a sweep` stand for. Reads or downloads their data and weights, to know them by.

    Raises UserError for words that can't be read, and when no run is left.
    """
    own = [word for word in words if word.removeprefix("++").startswith("sweep.")]
    rest = [word for word in words if word not in own]
    settings = compose_sweep([*expand([w for w in rest if w.startswith("experiment=")])[0], *own])
    given = {key for word in rest if (key := word.partition("=")[0])}
    rest = [f"{key}={_several(value)}" for key, value in settings.grid.items() if key not in given] + rest
    grid = expand(rest)
    if any(AUTO in chosen for chosen in grid):
        _whole_gpus(settings)
    varied = [index for index in range(len(rest)) if len({member[index] for member in grid}) > 1]
    members, excluded, contents = [], {}, set()
    known = Known()
    with Progress("planning", len(grid), " runs") as progress:
        for chosen in grid:
            name = " ".join(chosen[index] for index in varied) or "the only run"
            try:
                chosen = known.sized(chosen)
                config = compose(chosen)
                reason = _excluded(config, settings.exclude)
                member = None if reason else known.member(chosen, config, name, Path(settings.dir))
            except UserError as error:
                reason, member = str(error), None
            progress.add(1)
            if reason:
                excluded.setdefault(reason, []).append(name)
            elif member.content not in contents:
                members.append(member)
                contents.add(member.content)
    if not members:
        raise UserError("\n".join(dict.fromkeys(line for reason in excluded for line in reason.splitlines())))
    return Plan(members, excluded, len(grid) - len(members) - sum(map(len, excluded.values())), settings)


def _whole_gpus(settings: SweepConfig) -> None:
    """Raises UserError where the runs of a sweep don't have a GPU of this machine each, whose memory a batch could
    fit.
    """
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


def _several(value: Any) -> str:
    """The values of a grid's key in an experiment: a text in Hydra's grammar, or a list."""
    from s2a_cli.config.rules import show

    return ",".join(map(show, value)) if isinstance(value, list) else show(value)


def _excluded(config: DictConfig, rules: Iterable[dict[str, Any]]) -> str | None:
    """Why this run is left out; None if it is not. Raises UserError for a rule that names no setting."""
    if config.quant.name not in ("none", "exact") and not keeps_codable(config.method.name):
        return f"method={config.method.name} keeps nothing that quant= could code: it is run with quant=none"
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
                raise UserError(f"sweep.exclude: {key}: no such setting{nearest(key, [*GROUPS, *config])}")
            matches &= found in (value if isinstance(value, list) else [value])
        if matches:
            return rule.get("why") or "excluded: " + ", ".join(f"{key}={value}" for key, value in conditions.items())
    return None


class Known:
    """Data, weights and structures that a plan has looked at, each once."""

    def __init__(self) -> None:
        self._data: dict[str, Any] = {}
        self._weights: dict[str, str] = {}
        self._fits: set[str] = set()
        self._batches: dict[str, str] = {}

    def sized(self, words: list[str]) -> list[str]:
        """The words with optim.batch_size=auto replaced: what fits the first GPU; those of one machine are taken to be
        alike.

        A run is known by its batch, so that it has to be a number here, and the same whenever the sweep goes on: that
        of the whole memory of the GPU, whatever others hold of it now.
        """
        if AUTO not in words:
            return words
        alone = [word for word in words if not word.startswith("busy=")]
        unseeded = OmegaConf.merge(compose([word for word in alone if word != AUTO]), {"seed": 0})
        return [*(word for word in words if word != AUTO), _once(self._batches, unseeded, lambda: resolved(alone)[-1])]

    def member(self, words: list[str], config: DictConfig, name: str, root: Path) -> Member:
        """Raises UserError for data or weights that can't be had, and for settings that don't fit the backbone."""
        splits = _once(self._data, config.dataset, lambda: _summary(data.load(config.dataset)))
        revision, label, classes, images = splits
        seed = config.seed if not (config.backbone.pretrained or config.backbone.checkpoint) else None

        def fingerprint() -> str:
            torch.manual_seed(config.seed)
            return backbones.build(config.backbone, classes).fingerprint()

        weights = _once(self._weights, OmegaConf.create({"of": config.backbone, "seed": seed}), fingerprint)
        plain = OmegaConf.to_container(config, resolve=True)
        shape = json.dumps({key: plain[key] for key in ("backbone", "method", "quant", "optim", "precision")})
        if shape not in self._fits:
            run_module.attach(config, backbones.build(config.backbone, classes, meta=True))
            self._fits.add(shape)
        content = record.content(plain, revision, weights)
        place = root / label / config.backbone.name / config.method.name / record.identity(content)
        return Member(words, config, name, content, place, classes, images)


def _once(known: dict[str, Any], key: DictConfig, make: Callable[[], Any]) -> Any:
    text = json.dumps(OmegaConf.to_container(key, resolve=True), sort_keys=True)
    if text not in known:
        known[text] = make()
    return known[text]


def _summary(splits: data.Splits) -> tuple[str, str, int, int]:
    return splits.revision, splits.name, len(splits.classes), len(splits.train)


def predict(members: list[Member]) -> None:
    """Fills in the peak that each is predicted to need, in MiB; leaves None where that can't be said."""
    known: dict[str, float | None] = {}
    with Progress("predicting", len(members), " runs") as progress:
        for member in members:
            unseeded = OmegaConf.merge(member.config, {"seed": 0})
            key = OmegaConf.create({"config": unseeded, "classes": member.classes, "images": member.images})
            member.peak_mib = _once(
                known, key, lambda member=member: forecast.predicted_peak(member.config, member.classes, member.images)
            )
            progress.add(1)


@dataclass
class Summary:
    """How a sweep went: names of runs by how each ended."""

    done: list[Member] = field(default_factory=list)
    skipped: list[Member] = field(default_factory=list)  # finished before
    failed: list[tuple[Member, str]] = field(default_factory=list)  # with the last line that it said
    left: list[Member] = field(default_factory=list)  # not begun, or broken off

    def text(self) -> str:
        counts = f"{len(self.done)} done, {len(self.skipped)} skipped (finished before), {len(self.failed)} failed"
        lines = [counts + (f", {len(self.left)} left" if self.left else "")]
        for member, line in self.failed:
            lines += [f"  failed: {member.name}: {line}", f"    {member.folder / LOG}"]
        return "\n".join(lines)


class Sweep:
    """Runs what a plan leaves to be done, on an engine, and tells how it goes.

    force: finished runs too. retry: failed ones too. fail_fast: begin no more after the first that fails.
    """

    def __init__(self, planned: Plan, on: Engine, *, force: bool = False, retry: bool = False, fail_fast: bool = False):
        self.engine, self.fail_fast, self.force = on, fail_fast, force
        self.summary = Summary()
        self.todo: list[Member] = []
        self.jobs: dict[int, tuple[Member, Job, float]] = {}  # slot -> what runs there, since when
        self.busy: list[Member] = []  # at work in another process
        for member in planned.members:
            self._sort(member, force=force, retry=retry)
        self.total = len(self.todo) + len(self.busy)

    def _sort(self, member: Member, force: bool = False, retry: bool = False) -> None:
        """Puts a run where its folder says that it belongs."""
        state = member.state()
        if state == "running":
            self.busy.append(member)
        elif state == "done" and not force:
            self.summary.skipped.append(member)
        elif state in ("failed", "oom") and not (force or retry):
            self.summary.failed.append((member, f"{_last_line(member)} (before; --retry-failed tries again)"))
        else:
            self.todo.append(member)

    def __call__(self) -> Summary:
        """Until all is done. On Ctrl-C the running ones save where they are, and the rest is left."""
        try:
            with Progress("sweep", self.total, " runs") as progress:
                while self.todo or self.jobs or self.busy:
                    self._begin(progress)
                    self._collect(progress)
                    if not self.jobs and not self.todo:
                        self._wait_for_others(progress)
                    time.sleep(POLL)
        except KeyboardInterrupt:
            print("s2a: stopping; running ones save where they are", file=sys.stderr)
            for _, job, _ in self.jobs.values():
                job.stop()
            while any(job.poll() is None for _, job, _ in self.jobs.values()):
                time.sleep(POLL)
            self.summary.left = [*self.todo, *self.busy, *(member for member, _, _ in self.jobs.values())]
            raise
        return self.summary

    def _begin(self, progress: Progress) -> None:
        while self.todo:
            slot = self.engine.free(
                {slot: member.peak_mib for slot, (member, _, _) in self.jobs.items()}, self.todo[0].peak_mib
            )
            if slot is None:
                return
            member = self.todo.pop(0)
            words = [
                *member.command,
                "--force" if self.force else "--once",
            ]  # another sweep may have finished it by now
            try:
                run_folder.make_run_dir(member.folder)
                job = self.engine.start(words, member.folder / LOG, slot)
            except (UserError, OSError) as error:  # nothing can be written there
                self._failed(member, first_line(error), progress)
                continue
            self.jobs[slot] = member, job, time.monotonic()

    def _collect(self, progress: Progress) -> None:
        for slot, (member, job, since) in list(self.jobs.items()):
            code = job.poll()
            if code is None:
                continue
            del self.jobs[slot]
            state, took = member.state(), duration(time.monotonic() - since)
            if state == "running" or code == run_folder.Busy.code:  # another sweep was a moment faster
                self.busy.append(member)
                continue
            if state == "done" and (code == 0 or not self.force):
                self.summary.done.append(member)
                progress.note(f"done: {member.name}: {_figures(member)}, {took}", 1)
                continue
            self._failed(member, _last_line(member) if code > 0 else f"killed by signal {-code}", progress)

    def _failed(self, member: Member, line: str, progress: Progress) -> None:
        self.summary.failed.append((member, line))
        progress.note(f"failed: {member.name}: {line}", 1)
        if self.fail_fast:
            self.summary.left, self.todo = self.todo, []

    def _wait_for_others(self, progress: Progress) -> None:
        """Takes up what other processes have left, counts what they have finished."""
        waiting, self.busy = self.busy, []
        for member in waiting:
            self._sort(member)
        progress.add(len(waiting) - len(self.busy) - len(self.todo))
        if self.busy:
            time.sleep(5 * POLL)


def _figures(member: Member) -> str:
    result = record.read_result(member.folder)
    accuracy, memory = result["accuracy"], result["memory"]
    peak = f", peak {memory['peak_mib']:,.0f} MiB {memory['kind'].split('-')[0]}" if memory else ""
    tested = accuracy["test_top1"] is not None
    return (
        f"top-1 {accuracy['test_top1']:.2f} %" if tested else f"val top-1 {accuracy['val_top1']:.2f} %, not tested"
    ) + peak


def _last_line(member: Member) -> str:
    """What a run said last: its error."""
    try:
        lines = record.regular(member.folder / LOG, most=1 << 30).decode(errors="replace").splitlines()
    except (OSError, ValueError):
        lines = []
    said = [line.strip() for line in lines if line.strip()]
    if said:
        return printable(said[-1].removeprefix("s2a: "))
    try:
        return record.read_result(member.folder)["error"] or "said nothing"
    except UserError:
        return "said nothing"


def overview(planned: Plan, predicted: bool) -> str:
    """The plan as a table, with what is already there, and what is left out and why."""
    rows = []
    for member in planned.members:
        peak = "–" if member.peak_mib is None else f"{member.peak_mib:,.0f}"
        rows.append([member.name, member.state(), *([peak] if predicted else []), str(member.folder)])
    from tabulate import tabulate

    header = ["run", "state", *(["predicted peak MiB"] if predicted else []), "folder"]
    counts = Counter(row[1] for row in rows)
    lines = [
        tabulate(
            rows, header, disable_numparse=True, colalign=["left", "left", *(["right"] if predicted else []), "left"]
        )
    ]
    lines.append(f"\n{len(rows)} runs: " + ", ".join(f"{number} {state}" for state, number in counts.items()))
    return "\n".join([*lines, *left_out(planned)])


def left_out(planned: Plan) -> list[str]:
    """A line for each reason for which members of the grid are not run."""
    lines = []
    for reason, names in planned.excluded.items():
        lines.append(f"left out: {listed(names, 3, '; ')}: {reason.splitlines()[0]}")
    if planned.repeated:
        lines.append(f"left out: {planned.repeated} that are the same run as another of the grid")
    return lines


def sweep(words: list[str]) -> int:
    """`s2a sweep`: plans, runs, sums up. Returns the exit code: 0, or 1 if any run failed."""
    flags, words = [w for w in words if w.startswith("--")], [w for w in words if not w.startswith("--")]
    planned = plan(words)
    settings = planned.settings
    if settings.report:
        check_out(Path(settings.report), "sweep.report")
    if "--dry-run" in flags or settings.pack:
        predict(planned.members)
    if "--dry-run" in flags:
        print(overview(planned, predicted=True))
        return 0
    print(*left_out(planned), sep="\n", end="\n" if left_out(planned) else "")
    on = engine(settings, [member.config.device for member in planned.members])
    if on.note:
        print(on.note, file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs save where they are
    run = Sweep(
        planned, on, force="--force" in flags, retry="--retry-failed" in flags, fail_fast="--fail-fast" in flags
    )
    try:
        summary = run()
    finally:
        on.close()
        print(run.summary.text())
    if settings.report:
        from s2a_cli.results import html_report

        print(html_report.write([settings.dir], {}, Path(settings.report)))
    return 1 if summary.failed else 0
