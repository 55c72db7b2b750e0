"""What `result.json` holds, key by key."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypedDict, cast

Status = Literal["ok", "oom", "failed", "interrupted"]  # the last also while the run is going on


class Accuracy(TypedDict):
    """Figures in %; those on validation are of the best epoch. With several labels an image all but mAP are null."""

    val_top1: float | None
    val_balanced: float | None
    val_map: float | None
    test_top1: float | None
    test_top5: float | None  # null with fewer than 6 classes
    test_balanced: float | None  # mean over the classes of the accuracy on the images of each
    test_map: float | None  # mean over the classes of the average precision; null with one label an image
    best_epoch: int | None  # 1 is the first


NO_ACCURACY = cast(Accuracy, dict.fromkeys(Accuracy.__annotations__))


class Headline(NamedTuple):
    """What a run is judged by, in %: top-1, or with several labels an image mAP."""

    name: str
    val: float | None
    test: float | None


def headline(accuracy: Accuracy) -> Headline:
    """Returns the figures that stand for a run."""
    if accuracy["val_map"] is not None or accuracy["test_map"] is not None:
        return Headline("mAP", accuracy["val_map"], accuracy["test_map"])
    return Headline("top-1", accuracy["val_top1"], accuracy["test_top1"])


class Parameters(TypedDict):
    total: int
    trainable: int  # head apart
    head: int
    percent: float  # trainable, as % of the backbone without its head


class MemoryRecord(TypedDict):
    kind: Literal["measured-cuda", "predicted"]
    peak_mib: float  # of a training step
    static_mib: float  # weights, buffers, optimiser state
    kept_mib: float  # for the backward pass: after the forward pass, less static
    full_finetune_peak_mib: float  # of full fine-tuning, same backbone, batch and precision, quant=none
    reserved_mib: float | None  # what the allocator took from the device; predicted by a simulation of it
    full_finetune_kind: str  # predicted


class Throughput(TypedDict):
    train_images_per_second: float | None  # median over the steps after the first three; images already loaded


class Data(TypedDict):
    name: str  # of the data set in tables
    revision: str  # hash of the data's content
    classes: list[str]
    multi_label: bool  # whether an image may have several labels
    train: int  # images
    val: int
    test: int


class Choice(TypedDict):
    about: str  # in words
    words: list[str]  # of s2a train, that ask for the same settings
    needed_mib: float | None  # predicted, of the device; null for what is too slow to be looked at
    predicted_seconds: float | None  # of a step, from costs that were measured; null for what does not fit
    measured_seconds: float | None  # of a step, from micro-batches that were timed
    fidelity: float | None  # cosine of the gradient with the exact one; null where it was not measured
    why: str  # it was taken, or not


class Plan(TypedDict):
    settings: dict[str, Any]  # {dotted key: value} that was chosen; they are in `config`
    asked: dict[str, Any]  # the values of these keys before
    available_mib: float  # the budget
    batch: int  # images a step and process
    device: str
    seconds: float  # that it took to plan
    choices: list[Choice]  # what was chosen, then the alternatives


class Result(TypedDict):
    schema: int
    id: str  # 12 hex digits, see identity()
    status: Status
    error: str | None  # one line
    config: dict[str, Any]  # resolved
    allocation: dict[str, Any] | None  # of version 0.1.0: the quant settings that quant=auto chose
    plan: Plan | None  # what was chosen for a budget; null without one
    accuracy: Accuracy
    parameters: Parameters
    memory: MemoryRecord | None
    throughput: Throughput
    data: Data
    weights: str  # fingerprint of the pretrained tensors
    environment: dict[str, Any]
