"""The parts of an acceptance, in the order of what can be lost: first all that no clock is needed for, several
processes at
once; then, alone on the device, what is timed; then what was left."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from accept_machine import cores, host_gib, processes
from accept_plan import COMPILED, FIRST, Plan, fitting, title
from accept_pool import Pool, Task
from accept_summary import decisions, summary
from speed import set_speed

from s2a_cli.common.progress import Progress
from s2a_cli.common.text import duration
from s2a_cli.memory.margin import Margin
from s2a_cli.memory.result import MIB

MEMORY_UNTIL, SPEED_UNTIL, END = 0.55, 0.93, 0.98  # of the time
LEAST_ROUNDS = 3  # timed steps of a row whose race was broken off
ATTEMPTS = 4  # at a race, each without the row that ended the last
RACE_SECONDS = 75.0  # least that a race takes
PREDICT_SECONDS = 30.0  # at most that what is timed waits for predictions; they go on when it is over
CAPPED = 24  # decisions at most that are tried out
ANY_MIB = 20_000.0  # of the device for any combination: more than each of them is predicted to take
CONTEXT_MIB = 700.0  # of a process on the device, for the sharing of its memory
Entry = dict[str, Any]


class Run:
    """Call it: fills in `result()`, saved by `save(run)` after each task."""

    def __init__(
        self, plan: Plan, head: Entry, pool: Pool, predictors: Pool, began: float, seconds: float, save: Callable
    ):
        self.plan, self.head, self.pool, self.predictors = plan, head, pool, predictors
        self.solo = pool  # the pool that has the device to itself
        self.began, self.seconds, self.save = began, seconds, save
        self.interrupted = False
        self.predictions = {key(task): task for task in plan.predictions()}
        self.measures, self.checks, self.compilations, self.profiles = (
            plan.measures(),
            plan.checks(),
            plan.compilations(),
            plan.profiles(),
        )
        self.capped: list[Task] = []
        self.races: list[Entry] = []
        self.dropped_races = [f"speed {backbone} {precision}" for backbone, precision in plan.races]

    def at(self, share: float) -> float:
        """time.monotonic() when this share of the time is over."""
        return self.began + share * self.seconds

    def __call__(self) -> None:
        total = self.head["environment"]["total_mib"]
        self.pool.size, self.predictors.size = processes(total, cores(), host_gib())
        self.pool.room = 0.92 * total - CONTEXT_MIB * self.pool.size if total else float("inf")
        lead = sum((task.ask["method"], task.ask["quant"]) in FIRST for task in self.measures)
        first = [*self.compilations, *self.measures[:lead], *self.checks, *self.measures[lead:]]
        until = MEMORY_UNTIL if self.plan.races else END
        with Progress("acceptance", len(first) + len(self.profiles) + len(self.plan.races), " tasks") as self.progress:
            self._predict(until)
            self.pool.run(first, self.at(until), self._finished, self._needs, grace=20)
            self._alone()
            self.pool_of_one(self.profiles, self.at(SPEED_UNTIL))
            for number, (backbone, precision) in enumerate(self.plan.races):
                if time.monotonic() + (RACE_SECONDS if number else 0) < self.at(SPEED_UNTIL):
                    self._race(backbone, precision)
                    self.progress.add(1)
            self._predict(END)
            self.pool_of_one(self._to_try(), self.at(END))
            self.pool_of_one([*self.checks, *self.measures], self.at(END))
            self._predicts.join()

    def pool_of_one(self, tasks: list[Task], until: float) -> None:
        self.solo.run(tasks, until, self._finished, grace=self.seconds * (1 - END))

    def _alone(self) -> None:
        """Nothing else computes, here or on the device."""
        self._predicts.join(PREDICT_SECONDS)
        if self._predicts.is_alive():
            self.predictors.stop()
            self._predicts.join()
            self.predictors = Pool(self.predictors.start, self.predictors.size)
        if self.pool.size > 1:
            self.pool.stop()
            self.solo = Pool(self.pool.start, 1)

    def _predict(self, share: float) -> None:
        """Begins with the predictions that are open; ends by itself."""
        tasks, until = list(self.predictions.values()), self.at(share)
        self._predicts = threading.Thread(
            target=lambda: self.predictors.run(tasks, until, lambda task: self.save(self), grace=3), daemon=True
        )
        self._predicts.start()

    def _finished(self, task: Task) -> None:
        if task.problem and not task.refused:
            print(f"{task.name}: {task.problem}", file=sys.stderr, flush=True)
        used = duration(time.monotonic() - self.began)
        self.progress.add(1, task=task.name, used=f"{used} of {duration(self.seconds)}")
        self.save(self)

    def _needs(self, task: Task) -> float | None:
        """MiB of the device; None while that is still being predicted and the device has no room for any two."""
        if task.ask["kind"] != "measure":
            return task.needs_mib
        found = self.predictions[key(task)]
        if found.open and self._predicts.is_alive():
            return ANY_MIB if self.pool.room >= 2 * ANY_MIB else None
        return 1.1 * found.result["expected_reserved_mib"] if found.result else self.pool.room / 2

    # Speed

    def _race(self, backbone: str, precision: str) -> None:
        """Times all rows; one that ends the process is left out of the next attempt."""
        name, until = f"speed {backbone} {precision}", self.at(SPEED_UNTIL)
        self.dropped_races.remove(name)
        compiled = {
            t.ask["row"]: t
            for t in self.compilations
            if (t.ask["backbone"], t.ask["precision"]) == (backbone, precision)
        }
        names = [
            row for row in self.plan.order() if row in compiled or row not in COMPILED
        ]  # compiling takes too long for a second race
        entries = {row: {"name": row, "title": title(row), "problems": {}} for row in self.plan.rows if row in names}
        race = {
            "name": name,
            "backbone": backbone,
            "precision": precision,
            "batch": self.plan.batch,
            "rows": list(entries.values()),
        }
        self.races.append(race)
        rows = self._racing(race, names, entries, compiled)
        told: dict[str, list[float]] = {}
        for _ in range(ATTEMPTS):
            left = until - time.monotonic()
            if left < 5 and told:
                break
            told.clear()
            at: list[str] = []

            def hear(task: Task, message: Entry, told: dict = told, at: list = at) -> None:
                at[:] = [message["row"]]
                self.progress.add(0, task=f"{name} {message['row']}")
                if message["seconds"] is not None:
                    told.setdefault(message["row"], []).append(message["seconds"])

            ask = self.plan.ask(
                "speed", backbone, precision, rows=rows, steps=self.plan.steps, seconds=max(5.0, left - 5)
            )
            task = Task(name, ask, max(10.0, left) + 10, 90)
            self.solo.run([task], time.monotonic() + 5, told=hear, grace=task.limit)
            if task.result:
                race["context_mib"] = task.result["context_mib"]
                for found in task.result["rows"]:
                    entries[found["name"]].update(found)
                break
            reason = task.problem or "; ".join(self.solo.problems[-1:]) or "no time was left"
            if not at or at[0] not in rows:
                race["problem"] = reason
                break
            entries[at[0]]["problems"]["speed"] = f"ended the process of all rows: {reason}"
            rows.remove(at[0])
        for row, seconds in told.items():
            if (
                not entries[row].get("images_per_second")
                and not entries[row]["problems"]
                and len(seconds) >= LEAST_ROUNDS
            ):
                set_speed(entries[row], seconds, self.plan.batch)  # of a race that was broken off
        self.save(self)

    def _racing(self, race: Entry, names: list[str], entries: dict[str, Entry], compiled: dict[str, Task]) -> list[str]:
        """The rows to time, of the compiler's those that are compiled already; as many as fit the device together."""
        for row, entry in entries.items():
            task = self.predictions.get((race["backbone"], race["precision"], row))
            entry["predicted"] = task.result if task else None
            if row in compiled and not compiled[row].result:
                entry["problems"]["speed"] = compiled[row].problem or "compiling was not done in time"
        total = self.head["environment"]["total_mib"]
        room = 0.9 * total - 2 * CONTEXT_MIB if total else float("inf")
        able = [row for row in names if not entries[row]["problems"]]
        chosen, left_out = fitting(able, {row: entry["predicted"] or {} for row, entry in entries.items()}, room)
        for row in left_out:
            entries[row]["problems"]["speed"] = "the device has no room for it beside the other rows"
        return chosen

    # Memory

    @property
    def context_mib(self) -> float:
        """Of the device, outside of the allocator: the most that a process alone on it had; assumed where none was."""
        found = [race["context_mib"] for race in self.races if race.get("context_mib")]
        found += [task.result["context_mib"] for task in self.profiles if task.result and task.result["context_mib"]]
        return max(found, default=Margin().context / MIB)

    def _to_try(self) -> list[Task]:
        """Decisions that neither what was allocated nor what was reserved can judge, on an allocator of that size."""
        if not self.head["cuda"]:
            return []
        by_name = {task.name: task for task in self.measures}
        for one in decisions(self.memory(), self.context_mib):
            if one["so"] is None and len(self.capped) < CAPPED:
                ask = by_name[one["name"]].ask | {
                    "kind": "capped",
                    "gib": one["gib"],
                    "limit_mib": one["gib"] * 1024 - self.context_mib,
                }
                self.capped.append(Task(f"{one['name']} within {one['gib']} GiB", ask))
        return self.capped

    def memory(self) -> list[Entry]:
        """An entry a combination: what was predicted, and what was measured."""
        found = []
        for task in self.measures:
            own = {name: task.ask[name] for name in ("backbone", "precision", "method", "quant", "batch")}
            predicted = self.predictions[key(task)]
            problems = {"predicted": predicted.problem, "measured": task.problem}
            capped = {str(c.ask["gib"]): c.result["fits"] for c in self.capped if c.result and key(c) == key(task)}
            found.append(
                {
                    "name": task.name,
                    **own,
                    "predicted": predicted.result,
                    "measured": task.result,
                    "refused": task.refused,
                    "capped": capped,
                }
                | {"problems": {part: reason for part, reason in problems.items() if reason}}
            )
        return found

    def result(self) -> Entry:
        """The content of the result file, whatever has been done so far."""
        places = ("backbone", "precision", "row", "batch")

        def entries(tasks: list[Task]) -> list[Entry]:
            done = [task for task in tasks if not task.open]
            return [
                {
                    "name": t.name,
                    "seconds": t.seconds,
                    **{p: t.ask[p] for p in places},
                    **(t.result or {"problem": t.problem}),
                }
                for t in done
            ]

        tasks = [*self.compilations, *self.checks, *self.measures, *self.profiles, *self.capped]
        found = self.head | {
            "used_seconds": round(time.monotonic() - self.began, 1),
            "processes": self.pool.size,
            "interrupted": self.interrupted,
            "dropped": [task.name for task in tasks if task.open] + self.dropped_races,
            "not_predicted": [
                task.name for task in self.predictions.values() if task.result is None and not task.refused
            ],
            "not_started": [
                *self.pool.problems,
                *(self.solo.problems if self.solo is not self.pool else []),
                *self.predictors.problems,
            ],
            "context_mib": self.context_mib,
            "kernels": entries(self.checks),
            "compiled": entries(self.compilations),
            "memory": self.memory(),
            "speed": self.races,
            "host": entries(self.profiles),
        }
        return found | {"summary": summary(found)}


def key(task: Task) -> tuple[str, ...]:
    """What a prediction and its measurement have in common."""
    ask = task.ask
    return (ask["backbone"], ask["precision"], *((ask["row"],) if "row" in ask else (ask["method"], ask["quant"])))
