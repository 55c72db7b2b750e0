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


def about(words: list[str]) -> dict[str, Any]:
    """Returns what the results say of the run that all rows are: its device, and its backbone."""
    bench = Bench(words)
    return {"device": str(bench.device), "pixels": bench.attached.backbone.image.size}


def peaks(words: list[str], rows: list[Row]) -> list[float]:
    """Returns the predicted peak of each row in MiB."""
    bench = Bench(words)
    return [bench.peak_mib(row) for row in rows]


def planned(words: list[str], budget: str) -> tuple[Row, dict[str, Any]]:
    """Returns the plan for a budget as a row, and all that is known of it. Raises UserError where nothing fits."""
    return Bench(words).plan(budget)


def timed(words: list[str], row: Row) -> float:
    """Returns images a second of a step of a row, after one micro-batch."""
    bench = Bench(words)
    bench.seconds(row, bench.micro_batch(row))  # fits codes, and has memory cut as the steps need it
    images = bench.micro_batch(row) * -(-TIMED // bench.micro_batch(row))
    images = min(bench.batch, images)
    return images / bench.seconds(row, images)


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
        self._steps: dict[int, Step] = {}

    def micro_batch(self, row: Row) -> int:
        """Returns the images that go through the model at a time."""
        return row.settings.get("optim.micro_batch") or self.batch

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

    def seconds(self, row: Row, images: int) -> float:
        """Takes a step of so many images under the settings of a row, and returns its seconds."""
        step = self._steps.setdefault(id(row), Step(row.config(self.words), self.device, self.attached))
        with self.checkpointing(row):
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
