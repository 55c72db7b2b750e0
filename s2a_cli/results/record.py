"""The record of a run, its `result.json`: made, read and checked; and the identity under which a run is known."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from s2a_cli.common.errors import UserError
from s2a_cli.common.files import atomic_write
from s2a_cli.common.text import first_line, printable
from s2a_cli.config.schema import OLDER_VALUES
from s2a_cli.results.fields import (
    NO_ACCURACY,
    Accuracy,
    Choice,
    Data,
    Headline,
    MemoryRecord,
    Parameters,
    Plan,
    Result,
    Status,
    Throughput,
    headline,
)

__all__ = ["Accuracy", "Data", "Headline", "MemoryRecord", "Parameters", "Plan", "Result", "Throughput", "headline"]
SCHEMA = 1
PLANNED = ("quant", "optim.micro_batch", "backbone.weights", "cuda_graphs", "dataset.cache")  # what a budget chooses
MOST = 16 << 20  # bytes of a record; the largest has a name for each of some ten thousand classes
LARGEST = 1e20  # no figure of a record is as large
DEEPEST, LONGEST = 50, 300  # levels of a record; characters of a name

# Settings that do not change what a run computes: where it runs, where its files lie, what it logs.
NOT_IDENTITY = (
    *("device", "busy", "workers", "tensorboard", "profile", "run_dir", "save_minutes", "save_steps"),
    *("dataset.root", "dataset.file", "dataset.test_root", "dataset.download", "backbone.checkpoint"),
)
# Settings that are younger than schema 1: at these values a run is the one that it was before there were any.
YOUNGER = {"dataset.cache": None, "dataset.layout": None, "method.segments": 1, "optim.head_lr": None}
YOUNGER |= {"method.lr_scale": 1.0, "method.prompt.lr_scale": 1.0, "optim.balance": "none"}
YOUNGER |= {f"dataset.{name}": None for name in ("image_column", "label_column", "class_columns", "split_column")}
YOUNGER |= {f"dataset.{name}": None for name in ("separator", "multi_label", "hold_out")}
YOUNGER |= {"budget": None, "fidelity": "exact", "cuda_graphs": None, "backbone.channels_last": False}
OLDER = {"quant.budget_mib": None}  # settings of schema 1 that are gone, at the values of runs without them


@dataclass
class RecordBuilder:
    """What is known of a run so far, of which `result` makes its record, at any time."""

    id: str
    config: dict[str, Any]
    parameters: Parameters
    data: Data
    weights: str
    environment: dict[str, Any]
    plan: Plan | None = None
    accuracy: Accuracy = field(default_factory=lambda: NO_ACCURACY.copy())
    memory: MemoryRecord | None = None
    images_per_second: float | None = None
    status: Status = "interrupted"  # as it stands if the process is killed
    error: str | None = "the run did not end"

    def validated(self, scores: Mapping[str, Any], epoch: int) -> None:
        """Notes the figures on validation, in %, of the best epoch so far: top1, balanced, map."""
        self.accuracy = cast(Accuracy, self.accuracy | _of_split("val", scores) | {"best_epoch": epoch})

    def tested(self, scores: Mapping[str, Any]) -> None:
        """Notes the figures on test, in %: top1, top5, balanced, map."""
        self.accuracy = cast(Accuracy, self.accuracy | _of_split("test", scores))

    def predicted(self, memory: dict[str, Any] | None) -> None:
        """Notes the predicted memory of a step; None where it can't be predicted."""
        self.memory = cast(MemoryRecord | None, memory)

    def measured(self, memory: dict[str, Any]) -> None:
        """Notes the measured memory of a step in place of the predicted one; full fine-tuning's stays predicted."""
        full = {key: value for key, value in (self.memory or {}).items() if key.startswith("full_")}
        self.memory = cast(MemoryRecord, memory | full)

    def ended(self, status: Status, error: str | None = None) -> None:
        """Notes how the run ended, and in a line why, if it is not ok."""
        self.status, self.error = status, error

    def result(self) -> Result:
        """Returns the record, in the order in which result.json has its keys."""
        return {
            "schema": SCHEMA,
            "id": self.id,
            "status": self.status,
            "error": self.error,
            "config": self.config,
            "allocation": None,
            "plan": self.plan,
            "accuracy": self.accuracy,
            "parameters": self.parameters,
            "memory": self.memory,
            "throughput": {"train_images_per_second": self.images_per_second},
            "data": self.data,
            "weights": self.weights,
            "environment": self.environment,
        }


def _of_split(split: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    names = {f"{split}_{name}": name for name in ("top1", "top5", "balanced", "map")}
    return {key: scores.get(name) for key, name in names.items() if key in Accuracy.__annotations__}


def content(config: dict[str, Any], revision: str, weights: str) -> str:
    """Returns all that decides what a run computes, as JSON.

    That is its resolved config less NOT_IDENTITY, its data, its weights and the schema.
    """
    kept = json.loads(json.dumps(config))
    for key, value in OLDER.items():
        parent, _, name = key.rpartition(".")
        kept[parent].setdefault(name, value)
    for key in NOT_IDENTITY:
        parent, _, name = key.rpartition(".")
        (kept[parent] if parent else kept).pop(name, None)
    for key, value in YOUNGER.items():
        *parents, name = key.split(".")
        node = functools.reduce(lambda node, parent: node.get(parent) or {}, parents, kept)
        if node.get(name, value) == value:
            node.pop(name, None)
    for key, values in OLDER_VALUES.items():
        parent, name = key.split(".")
        for before, now in values.items():
            if kept[parent].get(name) == now:
                kept[parent][name] = before
    return json.dumps({"config": kept, "data": revision, "weights": weights, "schema": SCHEMA}, sort_keys=True)


def run_id(content: str) -> str:
    """Returns the first 12 hex digits of the SHA-256 of a run's `content`."""
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def write_result(folder: Path, result: Result) -> None:
    atomic_write(folder / "result.json", json.dumps(result, indent=2, default=str) + "\n")


def regular(path: Path | str, most: int = MOST) -> bytes:
    """Returns the bytes of a file.

    Raises ValueError for what is none, such as a pipe or a device, unread, and for more than `most` bytes.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("no regular file")
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"more than {most >> 20} MiB")
    return data


def load(path: Path | str) -> Result:
    """Returns the record in a file, with None for what an older one lacks.

    Raises OSError for a file that can't be read. Raises ValueError, in one line, for one that is no record, as other
    programs rely on what Result says.
    """
    try:
        result = json.loads(regular(path))
        if not isinstance(result, dict) or result.get("schema") != SCHEMA:
            raise ValueError(f"not a result of schema {SCHEMA}; train this run again")
        if odd := _odd_value(result) or _odd_type(result, Result, ""):
            raise ValueError(odd)
        return _completed(result)
    except KeyError as error:
        raise ValueError(f"no {error} in it") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _odd_value(result: dict[str, Any]) -> str | None:
    """Returns in words where a record holds what none does: odd texts, odd numbers, endless nesting; None: nowhere."""
    left: list[tuple[Any, str, int]] = [(result, "", 0)]
    while left:
        value, where, depth = left.pop()
        if depth > DEEPEST:
            return f"{where[:80]}: nested too deeply"
        if isinstance(value, dict):
            left += [(inner, f"{where}.{key}".lstrip("."), depth + 1) for key, inner in value.items()]
            left += [(key, f"the key {key!r}", depth + 1) for key in value]
        elif isinstance(value, list):
            left += [(inner, where, depth + 1) for inner in value]
        elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            return f"{where}: a text that is no Unicode"
        elif isinstance(value, int | float) and not abs(value) < LARGEST:  # nan, too
            return f"{where}: {str(value)[:40]} is no figure"
    return None


def _odd_type(value: Any, kind: Any, where: str) -> str | None:
    """Returns in words where a value is not of a type of Result; None where it is. A key may be missing."""
    if typing.is_typeddict(kind):
        if not isinstance(value, dict):
            return f"{where}: {_short(value)}, expected its keys"
        hints = typing.get_type_hints(kind).items()
        return next(
            filter(
                None, (_odd_type(value[key], of, f"{where}.{key}".lstrip(".")) for key, of in hints if key in value)
            ),
            None,
        )
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        odd = [_odd_type(value, one, where) for one in of]
        return None if None in odd else odd[0]
    if origin is typing.Literal:
        fits = value in of if isinstance(value, str) else False
    elif origin is list and isinstance(value, list):
        return next(filter(None, (_odd_type(one, of[0], where) for one in value)), None)
    elif kind is Any or kind is float:
        fits = kind is Any or (isinstance(value, int | float) and not isinstance(value, bool))
    else:
        fits = isinstance(value, origin or kind) and not (kind is int and isinstance(value, bool))
    if fits:
        return None
    expected = ", ".join(of) if origin is typing.Literal else (origin or kind).__name__
    return f"{where}: {_short(value)}, expected {expected}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:50]}..."


def _completed(result: dict[str, Any]) -> Result:
    """Raises KeyError without what every record has, ValueError for a config that can be none."""
    config = result["config"]
    for group in ("backbone", "method", "quant", "dataset", "optim"):
        if not isinstance(config[group], dict):
            raise ValueError(f"config.{group}: {_short(config[group])}, expected its settings")
    names = {f"config.{group}.name": config[group]["name"] for group in ("backbone", "method", "quant")}
    for key, name in (names | {"data.name": result["data"]["name"]}).items():
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST:
            raise ValueError(f"{key}: {_short(name)}, expected a name")
    if not isinstance(config.get("seed", 0), int):
        raise ValueError(f"config.seed: {_short(config['seed'])}, expected an integer")
    for key, values in OLDER_VALUES.items():
        parent, name = key.split(".")
        if config[parent].get(name) in values:
            config[parent][name] = values[config[parent][name]]
    for key in ("id", "status", "weights"):
        result[key] = result[key]
    result["data"]["revision"] = result["data"]["revision"]
    result["data"].setdefault("multi_label", False)
    for key in ("error", "allocation", "plan", "memory"):
        result.setdefault(key, None)
    for key in ("accuracy", "throughput"):
        result[key] = dict.fromkeys(typing.get_type_hints(Result)[key].__annotations__) | result.get(key, {})
    if plan := result["plan"]:
        for part, kind in ((plan, Plan), *((choice, Choice) for choice in plan.get("choices", ()))):
            if lacking := [key for key in kind.__annotations__ if key not in part]:
                raise KeyError(f"plan.{lacking[0]}")
        if not plan["choices"]:
            raise ValueError("plan.choices: empty")
        if odd := [key for name in ("settings", "asked") for key in plan[name] if key not in PLANNED]:
            raise ValueError(f"plan: {_short(odd[0])} is nothing that a budget chooses")
    plan = result["plan"] or {"settings": {}, "asked": {}}
    quants = config["quant"], result["allocation"], plan["settings"].get("quant"), plan["asked"].get("quant")
    for quant in quants:
        if not isinstance(quant, dict | None):
            raise ValueError(f"quant: {_short(quant)}, expected its settings")
        if quant and quant.get("blocks"):  # JSON has no integer keys
            quant["blocks"] = {int(number): settings for number, settings in _items(quant["blocks"])}
    return cast(Result, {key: value for key, value in result.items() if key in Result.__annotations__})


def _items(blocks: Any) -> Any:
    if not isinstance(blocks, dict):
        raise ValueError(f"quant.blocks: {_short(blocks)}, expected numbers of blocks with their settings")
    return blocks.items()


class NoResult(UserError):
    """A folder without a record."""


def read_result(folder: Path) -> Result:
    """Returns the record in a run's folder. Raises NoResult without one, UserError for one that can't be read."""
    path = Path(folder) / "result.json"
    try:
        return load(path)
    except (FileNotFoundError, NotADirectoryError):
        raise NoResult(f"{folder}: no result.json there; give the folder of a run") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({first_line(error)})") from None


def read_epochs(path: Path) -> list[dict[str, Any]]:
    """Returns the figures of each epoch of a metrics.jsonl; a last line that was cut short is skipped.

    Raises OSError for a file that can't be read, ValueError for one that a run does not write.
    """
    lines, epochs = regular(path).decode().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            point = json.loads(line)
            epoch = point["epoch"]
            if isinstance(epoch, bool | str) or not 0 < epoch < LARGEST:
                raise ValueError("no epoch")
            epochs.append(point | {"epoch": int(epoch)})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number < len(lines):
                raise ValueError(f"line {number}: {first_line(error)}") from None
    return epochs


def read_metrics(path: Path) -> list[tuple[int, float]]:
    """Returns (epoch, validation top-1 or mAP in %) of a metrics.jsonl; a last line that was cut short is skipped.

    Raises as read_epochs does.
    """
    points = []
    for point in read_epochs(path):
        score = point.get("val_top1", point.get("val_map"))
        if score is None:  # there was no validation
            continue
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 100:
            raise ValueError(f"epoch {point['epoch']}: no validation top-1 in %")
        points.append((point["epoch"], float(score)))
    return points


def finished(folder: Path, content: str) -> Result | None:
    """Returns the record of the run that `content` is of; None while it is not finished."""
    try:
        result = read_result(folder)
    except UserError:  # no record, or one that is damaged or of another schema: as if there were none
        return None
    same = content_of(result) == content
    return result if same and result["status"] == "ok" else None


def content_of(result: Result) -> str:
    """Returns the `content` of the run that a record is of: with a plan, of the words that asked for it."""
    return content(asked(result), result["data"]["revision"], result["weights"])


def asked(result: Result) -> dict[str, Any]:
    """Returns the config of a run as it was asked for: without what a plan chose."""
    config = dict(result["config"])
    plan = result.get("plan")
    for key, value in plan["asked"].items() if plan else ():
        group, _, name = key.partition(".")
        config[group] = config[group] | {name: value} if name else value
    return config


def differences(there: str, here: str) -> list[str]:
    """Returns what sets a run's `content` apart from another's: "optim.epochs=2, here 4", "other data"."""
    one, two = (_leaves(json.loads(text)) for text in (there, here))
    odd = [key for key in [*one, *(two.keys() - one.keys())] if one.get(key, "not set") != two.get(key, "not set")]
    named = {"data": "other data", "weights": "other pretrained weights"}
    said = [
        named.get(key) or f"{key.removeprefix('config.')}={one.get(key, 'not set')}, here {two.get(key, 'not set')}"
        for key in odd
    ]
    return list(dict.fromkeys(map(printable, said)))


def _leaves(node: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(node, dict) or not node:
        return {prefix: json.dumps(node)}
    return {
        key: text
        for name, inner in node.items()
        for key, text in _leaves(inner, f"{prefix}.{name}".lstrip(".")).items()
    }
