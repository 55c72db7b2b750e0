"""Runs a grid, each run in a process of its own: what is finished is skipped, what was broken off goes on."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from s2a_cli.common.errors import UserError
from s2a_cli.common.progress import Progress
from s2a_cli.common.text import duration, first_line, printable
from s2a_cli.results import record, run_folder
from s2a_cli.results.made_files import check_out
from s2a_cli.sweeps.grid import Grid
from s2a_cli.sweeps.launchers import Job, Launcher, make_launcher
from s2a_cli.sweeps.planning import Member, Plan, left_out, overview, plan, predict

LOG = "log.txt"  # in a run's folder: what it said, over all its attempts
POLL = 0.2  # seconds


@dataclass
class Summary:
    """The runs of a sweep by how each ended."""

    done: list[Member] = field(default_factory=list)
    skipped: list[Member] = field(default_factory=list)  # finished before
    failed: list[tuple[Member, str]] = field(default_factory=list)  # with the last line that it said
    left: list[Member] = field(default_factory=list)  # not begun, or broken off

    def text(self) -> str:
        """Returns the counts, and a line about each run that failed."""
        counts = f"{len(self.done)} done, {len(self.skipped)} skipped (finished before), {len(self.failed)} failed"
        lines = [counts + (f", {len(self.left)} left" if self.left else "")]
        for member, line in self.failed:
            lines += [f"  failed: {member.name}: {line}", f"    {member.folder / LOG}"]
        return "\n".join(lines)


class Sweep:
    """Runs what a plan leaves to be done, by a launcher, and reports how it goes.

    force: finished runs too. retry: failed ones too. fail_fast: begin no more after the first that fails.
    """

    def __init__(
        self, planned: Plan, launcher: Launcher, *, force: bool = False, retry: bool = False, fail_fast: bool = False
    ):
        self.launcher, self.fail_fast, self.force = launcher, fail_fast, force
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
        """Runs until all is done. On Ctrl-C the runs at work save where they are, and the rest is left."""
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
        """Starts runs in all slots that are free."""
        while self.todo:
            slot = self.launcher.free(
                {slot: member.needed_mib for slot, (member, _, _) in self.jobs.items()}, self.todo[0].needed_mib
            )
            if slot is None:
                return
            member = self.todo.pop(0)
            flag = "--force" if self.force else "--once"  # another sweep may have finished it by now
            try:
                run_folder.make_run_dir(member.folder)
                job = self.launcher.start([*member.command, flag], member.folder / LOG, slot)
            except (UserError, OSError) as error:  # nothing can be written there
                self._failed(member, first_line(error), progress)
                continue
            self.jobs[slot] = member, job, time.monotonic()

    def _collect(self, progress: Progress) -> None:
        """Sorts the runs whose processes have ended."""
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
            ended = "it ended well, and its folder holds the record of another run" if code == 0 else ""
            line = _last_line(member) if code > 0 else ended or f"killed by signal {-code}"
            self._failed(member, line, progress)

    def _failed(self, member: Member, line: str, progress: Progress) -> None:
        """Counts a run as failed, with the line that says why."""
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
    """Returns the accuracy and the peak of a finished run."""
    result = record.read_result(member.folder)
    accuracy, memory = result["accuracy"], result["memory"]
    peak = f", peak {memory['peak_mib']:,.0f} MiB {memory['kind'].split('-')[0]}" if memory else ""
    name, val, test = record.headline(accuracy)
    if test is not None:
        return f"{name} {test:.2f} %{peak}"
    return ("no figure, as no image has a label" if val is None else f"val {name} {val:.2f} %, not tested") + peak


def _last_line(member: Member) -> str:
    """Returns what a run said last: its error."""
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


def sweep(grid: Grid, flags: list[str]) -> int:
    """Plans, runs and sums up for `s2a sweep`. Returns the exit code: 0, or 1 if any run failed."""
    planned = plan(grid, dry="--dry-run" in flags)
    settings = planned.settings
    if settings.report:
        check_out(Path(settings.report), "sweep.report")
    if "--dry-run" in flags or settings.pack:
        predict(planned.members)
    if "--dry-run" in flags:
        print(overview(planned, predicted=True))
        return 0
    print(*left_out(planned), sep="\n", end="\n" if left_out(planned) else "")
    launcher = make_launcher(settings, [member.config.device for member in planned.members])
    if launcher.note:
        print(launcher.note, file=sys.stderr)
    force, retry, fail_fast = (flag in flags for flag in ("--force", "--retry-failed", "--fail-fast"))
    run = Sweep(planned, launcher, force=force, retry=retry, fail_fast=fail_fast)
    try:
        summary = run()
    finally:
        launcher.close()
        print(run.summary.text())
    if settings.report:
        from s2a_cli.results import html_report

        print(html_report.write([settings.dir], {}, Path(settings.report)))
    return 1 if summary.failed else 0
