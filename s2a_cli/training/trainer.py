"""Trains one run: config in, a folder with `result.json` out."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf

from s2a_cli import data, memory
from s2a_cli.backbones import frozen_weights
from s2a_cli.backbones.pretrained import map_tensors
from s2a_cli.common import distributed
from s2a_cli.common.errors import UserError
from s2a_cli.common.files import atomic_write
from s2a_cli.common.text import type_and_first_line
from s2a_cli.config.settings import plain, replaced
from s2a_cli.results import plan_text, record, run_folder
from s2a_cli.training import checkpoints, feature_cache, forecast, testing
from s2a_cli.training.compiling import compile_model
from s2a_cli.training.cuda_graphs import own_stream
from s2a_cli.training.environment import environment
from s2a_cli.training.evaluation import judge
from s2a_cli.training.loop import TrainLoop
from s2a_cli.training.run import OUT_OF_MEMORY, Run, prepare
from s2a_cli.training.step import AUTOCAST

Planner = Callable[[Run], record.Plan]
FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk; what failed can go on when there is space


def train(
    config: DictConfig, force: bool = False, skip_finished: bool = False, planner: Planner | None = None
) -> tuple[record.Result, Path]:
    """Trains one run and returns its record and its folder.

    A run that is finished is left as it is, and one that was broken off goes on, unless `force` starts it from the
    beginning. That, and another run in the same folder, leaves a finished one in place until the new one is whole. Out
    of memory and Ctrl-C end in a record with that status, as does a full disk, with `interrupted`. Any other failure is
    recorded as `failed` and raised.

    planner: chooses what a run with a budget leaves open. A run that was broken off keeps the plan in its record.

    skip_finished: a finished run is shown before a busy device is refused. Raises UserError when another process is at
    the same run, when the folder holds a run of another config or somebody's files, and when others use the run's CUDA
    device, unless `busy` allows that.
    """
    # Others are asked about before this process, or one that it is joined to, holds any of the device.
    own = distributed.own_device(config.device)
    refused = memory.refusal(own) if config.busy == "refuse" and own else None
    if refused and not skip_finished:
        raise refused
    with ExitStack() as stack:
        config.device = stack.enter_context(distributed.joined(config.device))
        if config.run_dir:
            # Before anything is downloaded; what is wrong with that leaves no folder.
            stack.callback(run_folder.remove_empty, run_folder.usable(Path(config.run_dir)))
        run = prepare(config)
        folder = Path(
            config.run_dir or f"runs/{run.splits.name}/{config.backbone.name}/{config.method.name}/{run.run_id}"
        )
        place = distributed.broadcast(lambda: run_folder.claim(folder, run.content, force, stack))
        if place is None:
            print(f"finished before, nothing is trained; --force trains it anew: {folder}")
            return record.read_result(folder), folder
        if refused:
            raise refused
        stored = None if force else _stored_plan(place, run.content)
        state = _begin(run, place, force)
        plan = planned(run, planner, stored)
        if place != folder:
            print(f"{folder}: its files stay until this run is whole")
        result = _train(run, place, state, plan)
        if distributed.is_main_process():
            run_folder.settle(folder)
        return result, folder


def _begin(run: Run, place: Path, force: bool) -> dict[str, Any] | None:
    """Returns the state from which to go on; None after the place was cleared for a run from the start."""
    state = None if force else checkpoints.load_state(place)
    if state and state["content"] == run.content:
        return state
    distributed.barrier()  # all have looked
    if distributed.is_main_process():
        place.mkdir(exist_ok=True)
        for name in (run_folder.STATE, run_folder.RECORD, run_folder.METRICS, run_folder.TRACEBACK, run_folder.TENSORS):
            (place / name).unlink(missing_ok=True)
        run_folder.remove_made(place)
    return None


def planned(run: Run, planner: Planner | None, stored: record.Plan | None) -> record.Plan | None:
    """Gives a run with a budget the settings of its plan, and returns the plan: the stored one, or a new one.

    Raises UserError where nothing fits the budget.
    """
    if not run.config.budget:
        return None
    if not stored and not planner:
        raise UserError(f"budget={run.config.budget}: this run has no plan; s2a train makes one")
    plan = stored or distributed.broadcast(lambda: cast(Planner, planner)(run))
    print(plan_text.render(plan))
    run.config = replaced(run.config, plan["settings"])
    if run.config.backbone.weights != plan["asked"].get("backbone.weights", run.config.backbone.weights):
        run.model.to("cpu")  # the plan was measured on the device; weights may have to stay on the host
        if run.config.backbone.weights == "offload" and run.config.backbone.pretrained:
            map_tensors(run.model, run.config.backbone.checkpoint or "")
        frozen_weights.store(run.backbone, run.config.backbone.weights, AUTOCAST.get(run.config.precision))
    if run.device.type == "cuda":
        torch.cuda.empty_cache()  # of what planning has left
    return plan


def _stored_plan(place: Path, content: str) -> record.Plan | None:
    """Returns the plan of a run that was begun in this place; None where there is none."""
    try:
        found = record.read_result(place)
    except UserError:
        return None
    return found["plan"] if record.content_of(found) == content else None


def _train(run: Run, folder: Path, state: dict[str, Any] | None, plan: record.Plan | None) -> record.Result:
    config, known = run.config, _begun(run)
    known.plan = plan
    write = record.write_result if distributed.is_main_process() else lambda folder, result: None
    write(folder, known.result())
    try:
        with ExitStack() as stack:
            if distributed.is_main_process():
                atomic_write(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
                testing.note_test_files(folder, run.splits)
            board = _tensorboard(folder, stack) if config.tensorboard and distributed.is_main_process() else None
            if distributed.is_main_process():
                print(data.describe(run.splits))
            predicted = None if config.compile else forecast.predict(run)  # the compiler decides what it keeps
            known.predicted(predicted)
            _announce_forecast(predicted, run.device)
            run.model.to(run.device)
            if config.cuda_graphs:
                stack.enter_context(own_stream(run.device))
            stack.enter_context(memory.snapshot(folder, run.device, config.profile == "memory"))
            if config.compile:
                compile_model(run.model, config.compile_budget, run.backbone.image.size)
            if run.feature_head:
                run.cache = feature_cache.opened(run)
            TrainLoop(run, folder, known, board)(state)
            judge(run, known.accuracy["test_top1"])
        known.ended("ok")
    except KeyboardInterrupt:  # torchrun ends all processes when one has ended
        elsewhere = distributed.announced()
        known.ended(*(("oom", elsewhere) if elsewhere else ("interrupted", "interrupted")))
    except OSError as error:
        if error.errno not in FULL:
            _failed(folder, known, error)
            raise
        known.ended("interrupted", f"{error.strerror} below {folder}: make room and start the same line again")
    except Exception as error:
        _failed(folder, known, error)
        if known.status == "failed":
            raise
    finally:
        write(folder, known.result())
    if known.status == "ok" and distributed.is_main_process():
        (folder / checkpoints.STATE).unlink(missing_ok=True)
    return known.result()


def _announce_forecast(predicted: dict[str, Any] | None, device: torch.device) -> None:
    """Says before the first step what the run is predicted to need, and warns where the device has less."""
    if predicted and distributed.is_main_process():
        said, warning = memory.outlook(predicted, device)
        print(said)
        if warning:
            print(f"s2a: {warning}", file=sys.stderr)


def _failed(folder: Path, known: record.RecordBuilder, error: Exception) -> None:
    """Notes in the record how a run failed, in this process or first in another.

    Writes a traceback beside it, unless memory ran out.
    """
    out_of_memory = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
    said = type_and_first_line(error)
    if out_of_memory:
        distributed.announce(said)
    elif elsewhere := distributed.announced():
        out_of_memory, said = True, elsewhere
    known.ended("oom" if out_of_memory else "failed", said)
    if not out_of_memory and distributed.is_main_process():
        atomic_write(folder / "traceback.txt", traceback.format_exc())


def _begun(run: Run) -> record.RecordBuilder:
    """Returns what is known of a run before its first step."""
    splits = run.splits
    return record.RecordBuilder(
        id=run.run_id,
        config=plain(run.config, resolve=True),
        parameters=cast(record.Parameters, run.backbone.count()),
        data={
            "name": splits.name,
            "revision": splits.revision,
            "classes": list(splits.classes),
            "multi_label": splits.multi_label,
            "train": len(splits.train),
            "val": len(splits.val),
            "test": len(splits.test),
        },
        weights=run.weights,
        environment=environment(str(run.device)) | {"processes": distributed.rank_and_world_size()[1]},
    )


def _tensorboard(folder: Path, stack: ExitStack) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("tensorboard=true needs a package that is not here: pip install tensorboard") from None
    return stack.enter_context(SummaryWriter(str(folder)))
