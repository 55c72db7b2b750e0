"""Tasks, the processes that work on them, and how these share a device and the time."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("accept_worker.py")
STARTS = 12  # processes that a pool starts at most in place of those that ended
POLL = 0.2  # seconds


class Failed(Exception):
    """The task can't be done; the process goes on unless `ends`."""

    def __init__(self, reason: str, *, out_of_memory: bool = False, ends: bool = False, refused: bool = False):
        super().__init__(reason)
        self.out_of_memory, self.ends, self.refused = out_of_memory, ends, refused


@dataclass
class Task:
    """A question to a worker, and what came of it: `result`, or why there is none; neither where there was no time."""

    name: str  # on the page
    ask: dict[str, Any]
    limit: float = 60.0  # seconds
    silence: float = 60.0  # seconds between two lines of the worker
    needs_mib: float | None = None  # of the device; None: not known
    result: Any = None
    problem: str | None = None
    refused: bool = False  # the product does not take these settings
    seconds: float = 0.0  # that it took
    alone: bool = False  # ran out of memory beside others: tried again without them

    @property
    def open(self) -> bool:
        return self.result is None and self.problem is None


class Worker:
    """A process of accept_worker.py."""

    def __init__(self, device: str, env: dict[str, str], command: Iterable[str] = (sys.executable, str(WORKER))):
        self.log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 (open as long as the process)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen([*command, device], env=env, text=True, start_new_session=True, **pipes)
        assert self.process.stdin and self.process.stdout
        self._to_process, self._from_process = self.process.stdin, self.process.stdout
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._from_process:
            self.lines.put(line)
        self.lines.put(None)

    def ask(self, task: Task, seconds: float, told: Callable[[Any], None] = lambda message: None) -> Any:
        """The result of a task. Raises Failed, also where the process ends, or takes longer than it may."""
        until = time.monotonic() + seconds
        try:
            self._to_process.write(json.dumps(task.ask) + "\n")
            self._to_process.flush()
        except OSError:
            raise Failed(self._ended(), ends=True) from None
        while True:
            patience = min(until - time.monotonic(), task.silence)
            try:
                line = self.lines.get(timeout=max(patience, 0.0))
            except queue.Empty:
                self.close()
                said = (
                    f"took more than {seconds:.0f} s"
                    if time.monotonic() >= until
                    else f"said nothing for {task.silence:.0f} s"
                )
                raise Failed(f"{said}, and was ended", ends=True) from None
            if line is None:
                raise Failed(self._ended(), ends=True)
            try:
                message = json.loads(line)
            except json.JSONDecodeError:
                continue  # printed by a library while it was imported
            if "told" in message:
                told(message["told"])
            elif "done" in message:
                return message["done"]
            else:
                flags = {flag: bool(message.get(flag)) for flag in ("out_of_memory", "ends", "refused")}
                raise Failed(message["failed"], **flags)

    def _ended(self) -> str:
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.close()
            code = None
        said = [line.strip() for line in self.text().splitlines() if line.strip() and not line.startswith("---")]
        return f"its process ended with code {code}" + (f": {said[-1][:200]}" if said else "")

    def text(self) -> str:
        """What the process wrote to stderr."""
        file = self.log.fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")  # the place to write at is shared

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what the compiler has started, too
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver in trouble
            self.process.wait(5)


ABOUT = Task("the device", {"kind": "about"}, limit=150.0, silence=150.0)


class Pool:
    """Some workers on a device that take tasks from one list, each the first that fits what the others leave of the
    memory.
    """

    def __init__(self, start: Callable[[], Worker], size: int, room_mib: float = float("inf")):
        self.start, self.size, self.room = start, size, room_mib
        self.problems: list[str] = []  # why processes could not be started
        self.about: dict[str, Any] | None = None  # what the first worker said of the device
        self._idle: list[Worker] = []
        self._all: list[Worker] = []
        self._changed = threading.Condition()
        self._held: dict[int, float] = {}  # thread -> MiB of its task
        self._stopped = False

    def ready(self, seconds: float) -> None:
        """Starts a worker, that says what the device is: what `about` is then. Raises Failed."""
        self._idle.append(self._worker(time.monotonic() + seconds))

    def run(
        self,
        tasks: list[Task],
        until: float,
        finished: Callable[[Task], None] = lambda task: None,
        needs: Callable[[Task], float | None] = lambda task: 0.0,
        told: Callable[[Task, Any], None] = lambda task, message: None,
        grace: float = 0.0,
    ) -> None:
        """Returns when all tasks have come to an end, which `finished` is told, or no worker is left, or it is late.

        until: of time.monotonic(): no task begins after it, and `grace` seconds later those that go on are ended.
        needs: MiB of a task; None: wait, it will be known. told: what workers say on the way.
        """
        waiting = [task for task in tasks if task.open]

        def work() -> None:
            worker = None
            try:
                while task := self._next(waiting, until, needs):
                    try:
                        worker = worker or self._worker(until + grace)
                    except Failed as error:
                        self.problems.append(str(error))
                        waiting.insert(0, task)
                        return
                    worker = self._work(worker, task, waiting, until + grace, told)
                    self._let_go()
                    if not task.open:
                        finished(task)
            except Exception as error:  # a mistake here: the other workers go on
                traceback.print_exc()
                self.problems.append(f"{type(error).__name__}: {error}")
            finally:
                if worker is not None:
                    self._idle.append(worker)
                self._let_go()

        threads = [threading.Thread(target=work, daemon=True) for _ in range(self.size)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):  # Ctrl-C gets through
            time.sleep(POLL / 4)

    def _next(self, waiting: list[Task], until: float, needs: Callable[[Task], float | None]) -> Task | None:
        with self._changed:
            while (
                time.monotonic() < until and not self._stopped and (waiting or self._held)
            ):  # what is held may come back
                for task in waiting:
                    need = float("inf") if task.alone else needs(task)
                    if need is not None and (not self._held or sum(self._held.values()) + need <= self.room):
                        waiting.remove(task)
                        self._held[threading.get_ident()] = need
                        return task
                self._changed.wait(POLL)
        return None

    def _let_go(self) -> None:
        with self._changed:
            self._held.pop(threading.get_ident(), None)
            self._changed.notify_all()

    def _worker(self, until: float) -> Worker:
        """One that is idle, or another that has said what its device is. Raises Failed."""
        with self._changed:
            if self._idle:
                return self._idle.pop()
            if len(self._all) >= STARTS + self.size:
                raise Failed(f"{len(self._all)} processes were started, and ended")
            worker = self.start()
            self._all.append(worker)
        try:
            about = worker.ask(ABOUT, max(1.0, min(ABOUT.limit, until - time.monotonic())))
        except Failed:
            worker.close()
            raise
        self.about = self.about or about
        return worker

    def _work(
        self, worker: Worker, task: Task, waiting: list[Task], until: float, told: Callable[[Task, Any], None]
    ) -> Worker | None:
        """Does a task, or notes why not. Returns the worker, None where it has ended."""
        began = time.monotonic()
        try:
            task.result = worker.ask(
                task, max(1.0, min(task.limit, until - began)), lambda message: told(task, message)
            )
            return worker
        except Failed as error:
            cut_off = error.ends and time.monotonic() >= until  # by the end of the time: dropped, not failed
            with self._changed:
                beside = len(self._held) > 1
            if error.out_of_memory and beside and not task.alone:
                task.alone = True
                waiting.append(task)
            elif not cut_off and not self._stopped:
                task.problem, task.refused = str(error), error.refused
            if error.ends:
                worker.close()
                return None
            return worker
        finally:
            task.seconds = time.monotonic() - began

    def stop(self) -> None:
        """Ends all processes, and soon the run."""
        self._stopped = True
        for worker in self._all:
            worker.close()

    def log(self) -> str:
        return "\n".join(worker.text() for worker in self._all)
