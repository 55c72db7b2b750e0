"""What budgets.py runs in processes of their own: predictions, plans, and steps of one row."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch

import s2a_cli.methods  # noqa: F401 (its structures declare their settings)
from s2a_cli import backbones
from s2a_cli.common.errors import UserError
from s2a_cli.common.progress import Progress
from s2a_cli.config.compose import compose
from s2a_cli.config.settings import replaced
from s2a_cli.memory.result import MIB
from s2a_cli.planner import plan
from s2a_cli.planner.sizes import size
from s2a_cli.planner.task import Task
from s2a_cli.training import forecast
from s2a_cli.training.run import attach, choose_device
from s2a_cli.training.step import Step, make_optimizer, train_mode

CLASSES = 100
TIMED = 16  # images of a step at least, in whole micro-batches


@dataclass
class Row:
    """A way to take a step, what it is predicted to need and what its steps took."""

    name: str
    settings: dict[str, Any]  # words of a run
    kind: str = "stock"
    timm: bool = False  # timm's own checkpointing is on
    peak_mib: float = 0.0
    screened: float = 0.0  # images a second at first sight
    rates: list[float] = field(default_factory=list)  # images a second, in steps beside others

    @property
    def rate(self) -> float:
        """Returns images a second."""
        return statistics.median(self.rates)

    @property
    def shown(self) -> str:
        """Returns images a second in words."""
        return f"{self.rate:.2f}" if self.rates else f"({self.screened:.2f})"

    def config(self, words: list[str]) -> Any:
        """Returns the row's config, for the words of all rows; of a plan with the settings that it chose."""
        if self.kind == "plan":
            return replaced(compose(words), self.settings)
        return compose([*words, *(f"{key}={value}" for key, value in self.settings.items())])

    def is_same(self, other: Row, words: list[str]) -> bool:
        """Returns whether two rows are the same step."""
        configs = (row.config(words) for row in (self, other))
        first, second = (replaced(config, {"cuda_graphs": bool(config.cuda_graphs)}) for config in configs)
        return self.timm == other.timm and first == second


def processes() -> ProcessPoolExecutor:
    """Returns what runs one function at a time, each in a process whose memory nothing else has used.

    What a step takes depends on the heap that the steps before it left behind.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([plan.__name__, backbones.__name__, Step.__module__])  # torch and timm
    return ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)


def predicted(words: list[str], rows: list[Row]) -> tuple[dict[str, Any], list[float]]:
    """Returns the device and the pixels of a side of an image, and the predicted peak of each row in MiB."""
    bench = Bench(words)
    about = {"device": str(bench.device), "pixels": bench.attached.backbone.image.size}
    with Progress("predicting", len(rows), " rows") as progress:
        peaks = []
        for row in rows:
            peaks.append(bench.peak_mib(row))
            progress.add(1)
    return about, peaks


def planned(words: list[str], budget: str) -> tuple[Row, dict[str, Any]]:
    """Returns the plan for a budget as a row, and all that is known of it. Raises UserError where nothing fits."""
    return Bench(words).plan(budget)


def timed(words: list[str], row: Row) -> float:
    """Returns images a second of a step of a row, after one micro-batch."""
    bench = Bench(words)
    step = Step(row.config(words), bench.device, bench.attached)
    micro_batch = row.settings.get("optim.micro_batch") or bench.batch
    images = min(bench.batch, micro_batch * -(-TIMED // micro_batch))
    with bench.checkpointing(row):
        bench.seconds(step, micro_batch)  # fits codes, and has memory cut as the steps need it
        return images / bench.seconds(step, images)


class Bench:
    """Holds one model, and takes steps of it under the settings of rows."""

    def __init__(self, words: list[str]):
        self.words = words
        config = compose([*words, "quant=none"])
        self.batch: int = config.optim.batch_size
        self.device = choose_device(config.device)
        torch.manual_seed(config.seed)
        self.attached = attach(config, backbones.build(config.backbone, CLASSES))
        self.model = self.attached.model.to(self.device)
        train_mode(self.model)
        generator = torch.Generator().manual_seed(0)
        pixels = self.attached.backbone.image.size
        self.images = torch.randn(self.batch, 3, pixels, pixels, generator=generator).to(self.device)
        self.targets = torch.randint(CLASSES, (self.batch,), generator=generator).to(self.device)
        self.optimizer = make_optimizer(config.optim, self.model, self.attached)

    @contextmanager
    def checkpointing(self, row: Row) -> Iterator[None]:
        """Switches timm's checkpointing on within, where the row has it."""
        switch = getattr(self.model, "set_grad_checkpointing", None)
        if row.timm and switch is None:
            raise UserError(f"timm's {type(self.model).__name__} has no gradient checkpointing")
        if row.timm:
            cast(Any, switch)(True)
        try:
            yield
        finally:
            if row.timm:
                cast(Any, switch)(False)

    def peak_mib(self, row: Row) -> float:
        """Returns the predicted peak of a row in MiB."""
        with self.checkpointing(row):
            return forecast.profile_step(self.attached, row.config(self.words), self.batch).peak_bytes / MIB

    def seconds(self, step: Step, images: int) -> float:
        """Takes a step of so many images and returns its seconds."""
        self._wait()
        begun = time.perf_counter()
        step(self.model, self.optimizer, self.images[:images], self.targets[:images])
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def plan(self, budget: str) -> tuple[Row, dict[str, Any]]:
        """Returns the plan for a budget as a row, and all that is known of it. Raises UserError where nothing fits."""
        config = compose([*self.words, f"budget={budget}"])
        task = Task(config, self.attached, CLASSES, self.batch, size("budget", budget))

        def refuse(least: float) -> str:
            return f"budget={budget}: nothing fits; the least is {least / MIB:,.1f} MiB"

        def stored(weights: str | None) -> Any:
            if weights is not None:
                raise UserError(f"backbone.weights={weights}: weights stay as they are here")
            return self.attached

        made = plan.make(task, (self.images, self.targets), self.device, stored, refuse)
        chosen = made["choices"][0]
        row = Row(chosen["about"], made["settings"], "plan", peak_mib=chosen["needed_mib"] or 0.0)
        return row, dict(made)
