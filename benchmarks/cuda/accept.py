"""One command, under 8 minutes on one GPU, that settles what can't be settled without one.

    python benchmarks/cuda/accept.py                        # on a CUDA device; writes benchmarks/cuda/DEVICE.json and
    .md python benchmarks/cuda/accept.py --tiny                 # the same parts on small models: does everything run
    here? python benchmarks/cuda/accept.py --device cpu --tiny    # without CUDA; says nothing about it

Triton kernels against their twins, the predicted peak against the allocator's counter for 240 combinations, the
simulated allocator against what is reserved, images a second of all rows of rows.py side by side, and the host's share
of a step. Other words: minutes=8 (for all of it), batch=N (images a step; null: by the device's memory), out=FOLDER,
name=NAME.

Everything is computed in processes of their own: what crashes or hangs there is a line on the page, with its reason,
and the next process goes on. What there is no time for is dropped, the least important first, and the page says which.
The files are written every few seconds: an end in the middle leaves what was found.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "benchmarks" / "tiers"), str(ROOT)]

try:
    import torch
    from accept_page import markdown
    from accept_plan import Plan
    from accept_pool import Failed, Pool, Worker
    from accept_run import Run
    from tiers_report import draw

    from s2a_cli.common import files as files_module
    from s2a_cli.common.errors import UserError
    from s2a_cli.results import run_folder
except ImportError as error:
    sys.exit(f"a package is not here ({error}): pip install -e {ROOT}, and peft for the rows of LoRA")

SAVE_SECONDS = 5.0
HIDDEN = (
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "CUDA_LAUNCH_BLOCKING",
)  # other figures


def arguments(argv: list[str]) -> argparse.Namespace:
    """Raises UserError for words that can't be read."""
    parser = argparse.ArgumentParser(
        "accept.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models")
    words = "minutes=8, batch=N, out=FOLDER, name=NAME, only=memory"
    parser.add_argument("words", nargs="*", metavar="key=value", help=words)
    found = parser.parse_args(argv)
    kinds = {"minutes": float, "batch": int, "out": Path, "name": str, "only": str}
    given: dict[str, Any] = {"minutes": 8.0, "batch": None, "out": Path(__file__).parent, "name": None, "only": None}
    for word in found.words:
        key, equals, value = word.partition("=")
        if not equals or key not in kinds:
            raise UserError(f"{word}: expected one of {', '.join(f'{key}=...' for key in kinds)}")
        try:
            given[key] = kinds[key](value)
        except ValueError:
            raise UserError(f"{word}: expected a number") from None
    for key in ("minutes", "batch"):
        if given[key] is not None and not (math.isfinite(given[key]) and given[key] > 0):
            raise UserError(f"{key}={given[key]}: expected a number above 0")
    if given["only"] not in (None, "memory"):
        raise UserError(f"only={given['only']}: expected only=memory")
    vars(found).update(given)
    if found.device == "cpu" and not found.tiny:
        raise UserError("--device cpu needs --tiny: the whole takes days on a CPU, and would say nothing about CUDA")
    if found.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"PyTorch {torch.__version__} (built for CUDA {torch.version.cuda}) finds no CUDA device here;"
            " --device cpu --tiny runs the small form without one"
        )
    return found


def environ(device: str) -> dict[str, str]:
    """Of the workers: the allocator's and cuBLAS' settings are those that predictions are made for, nothing is
    downloaded.
    """
    env = {key: value for key, value in os.environ.items() if key not in HIDDEN}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    if device == "cuda":
        return {key: value for key, value in env.items() if key != "TRITON_INTERPRET"} | {
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8"
        }
    return env | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}


def remarks(about: dict[str, Any], device: str) -> list[str]:
    """What one should know before the time is spent."""
    if device == "cpu":
        return []
    said = [f"{about['device']}, driver {about['driver']}, torch {about['torch']}, codes made by: {about['kernels']}"]
    if not str(about["kernels"]).startswith("triton"):
        said.append(
            "warning: Triton builds no kernels here (it needs a C compiler and Python's headers): none will be checked"
        )
    if about["rivals"]:
        said.append(f"warning: the device is not idle: {about['rivals']}: speeds will be no figures")
    if not about["peft"]:
        said.append("warning: peft is not here: no rows of LoRA (pip install peft)")
    return said


def commit() -> str | None:
    """Of this checkout, with a + where files were changed; None where git can't tell."""
    try:
        said = [
            subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0] + ("+" if said[1] else "")


def finite(value: Any) -> Any:
    """The same, with words in place of numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Files:
    """The result and its page. An earlier result of the same name stays."""

    def __init__(self, folder: Path, name: str):
        taken = {path.stem for path in folder.glob("*.json")}
        numbered = (name if number == 1 else f"{name}-{number}" for number in range(1, 1000))
        self.path = folder / next(one for one in numbered if one not in taken)
        self._last, self._lock = -math.inf, threading.Lock()

    def save(self, run: Run, final: bool = False) -> None:
        with self._lock:
            if not final and time.monotonic() - self._last < SAVE_SECONDS:
                return
            result = run.result()
            files_module.atomic_write(
                self.path.with_name(f"{self.path.name}.json"), json.dumps(finite(result), indent=1) + "\n"
            )
            try:
                page = markdown(result)
            except Exception:  # the figures are safe: no page is worth the rest of the run
                page = f"The page could not be made of {self.path.name}.json:\n\n    " + traceback.format_exc().replace(
                    "\n", "\n    "
                )
            files_module.atomic_write(self.path.with_name(f"{self.path.name}.md"), page)
            self._last = time.monotonic()
            if final and result["speed"]:
                self.draw(result)

    def draw(self, result: dict[str, Any]) -> None:
        """Draws the first race: images a second over the peak beside the other rows, a curve a means."""
        race = result["speed"][0]
        points = {
            row["name"]: (row["beside_mib"], row["images_per_second"])
            for row in race["rows"]
            if row.get("beside_mib") and row.get("images_per_second")
        }
        title = f"{race['backbone']}, {race['precision']}, on {result['environment']['device']}"
        memory = f"peak memory of a step of {race['batch']} images, MiB (measured)"
        draw(points, self.path.with_name(f"{self.path.name}.png"), title, memory, "images a second")


def accept(argv: list[str]) -> Path:
    """Runs all of it; returns the path of the page.

    Raises UserError for bad words, and where no process starts on the device.
    """
    began, chosen = time.monotonic(), arguments(argv)
    try:
        run_folder.make_run_dir(chosen.out)
    except UserError:
        raise UserError(
            f"out={chosen.out}: nothing can be written there; set out= to a folder that can be written to"
        ) from None
    pool = Pool(lambda: Worker(chosen.device, environ(chosen.device)), 1)
    predictors = Pool(lambda: Worker("cpu", environ("cpu")), 1)
    pools = [pool, predictors]
    try:
        print(f"starting a process on {chosen.device} ...", file=sys.stderr, flush=True)
        try:
            pool.ready(150)
        except Failed as error:
            raise UserError(f"--device {chosen.device}: {error}") from None
        about: dict[str, Any] = (pool.about or {}) | {"hidden": [key for key in HIDDEN if key in os.environ]}
        for line in remarks(about, chosen.device):
            print(line, file=sys.stderr, flush=True)
        plan = Plan.of(chosen.device, chosen.tiny, about["total_mib"], chosen.batch)
        if chosen.only:
            plan = plan.of_memory()
        head = {
            "benchmark": "accept",
            "command": " ".join(["python benchmarks/cuda/accept.py", *argv]),
            "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
            "commit": commit(),
            "small": chosen.tiny,
            "cuda": chosen.device == "cuda",
            "minutes": chosen.minutes,
            "environment": about,
        }
        slug = re.sub(r"\W+", "_", about["device"] if chosen.device == "cuda" else "cpu").strip("_").lower()
        files = Files(chosen.out, chosen.name or slug + ("_tiny" if chosen.tiny else ""))
        run = Run(plan, head, pool, predictors, began, chosen.minutes * 60, files.save)
        try:
            run()
        except KeyboardInterrupt:
            run.interrupted = True
        finally:
            pools += [run.solo, run.predictors]
            files.save(run, final=True)
            logs = "\n".join(one.log() for one in dict.fromkeys(pools))
            files.path.with_name(f"{files.path.name}.log").write_text(logs)
    finally:
        for one in pools:
            one.stop()
    return files.path.with_name(f"{files.path.name}.md")


def main(argv: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what was found is written
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    try:
        path = accept(argv)
    except UserError as error:
        print(f"accept.py: {error}", file=sys.stderr)
        return error.code
    print(path.read_text())
    print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
