"""Plans of runs that train on kept features: whether features are kept, and what is planned behind them."""

from __future__ import annotations

import itertools
import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch

from s2a_cli import backbones
from s2a_cli.backbones import frozen_weights
from s2a_cli.cli.main import main
from s2a_cli.common.progress import Progress
from s2a_cli.config.compose import compose
from s2a_cli.config.settings import replaced
from s2a_cli.memory.result import MIB
from s2a_cli.planner import kept_features
from s2a_cli.planner.blocks import Blocks, kinds_of
from s2a_cli.planner.candidates import EXACT, MODES, PLAIN, RECOMPUTED, Candidate
from s2a_cli.planner.fidelity import Fidelity
from s2a_cli.planner.run_plan import plan_run
from s2a_cli.planner.task import Task
from s2a_cli.planner.timer import Timer
from s2a_cli.training import trainer
from s2a_cli.training.run import attach, prepare

CPU = torch.device("cpu")
DEPTH = "+backbone.kwargs.depth=4"
SHORT = ["backbone=vit_micro", "backbone.pretrained=false", DEPTH, "dataset.shots=4", "device=cpu"]
SHORT += ["dataset.scale=null", "optim.batch_size=32", "optim.epochs=2"]
LAST = ["method=s2a", "method.blocks=last:2", "method.side.blocks=last:3"]  # the branch reads a block that is kept
RESNET = ["backbone=resnet18", "backbone.image_size=32", "method=residual_adapter"]
RESNET += ["method.blocks=last:1"]
AUTO = ["budget=1GiB", "dataset.cache=auto"]


def task_of(*words: str) -> Task:
    config = compose([*(word for word in SHORT if word != DEPTH or "backbone=resnet18" not in words), *words])
    torch.manual_seed(0)
    return Task(config, attach(config, backbones.build(config.backbone, 10)), 10, 32, 1000 * MIB)


def images_of(task: Task) -> torch.Tensor:
    size = task.attached.backbone.image.size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8, generator=generator)


def timer_of(task: Task) -> Timer:
    features = kept_features.captured(task.config, task.attached, images_of(task), CPU)
    progress = Progress("", None, "", quiet=True).__enter__()
    return Timer(task.config, task.attached, (features, torch.arange(8)), CPU, progress)


def decided(
    *words: str, images: int = 1000, epochs: int = 10, processes: int = 1, filled: bool = False
) -> kept_features.Decision:
    task = task_of(*AUTO, f"optim.epochs={epochs}", *words)
    there = (lambda features: True) if filled else (lambda features: False)
    return kept_features.decide(task.config, task.attached, images_of(task), images, 0, CPU, processes, there)


@pytest.fixture
def timed(monkeypatch):
    """Of the timed images the whole model takes 20 ms, what is behind the kept features 10, to keep these 20."""
    seconds = itertools.cycle((0.02, 0.01, 0.02))
    monkeypatch.setattr(kept_features, "_least", lambda run, device: (run(), next(seconds))[1])


@pytest.mark.parametrize("words", [["method=side"], ["method=linear"], LAST], ids=lambda words: words[0])
def test_features_are_kept_where_that_saves_time(timed, words):
    found = decided(*words, epochs=100)
    assert found.keeps and found.settings == {"dataset.cache": "features"} and "on the disk" in found.why


def test_features_are_not_kept_where_that_is_slower_or_cannot_be(timed, monkeypatch):
    assert "would save" in decided("method=side", epochs=1).why, "of an image and its mirror image, none is seen twice"
    assert "first block on" in decided("method=bias").why
    assert "trains BatchNorms" in decided(*RESNET).why
    assert decided("method=side", epochs=1, filled=True).keeps, "what is there takes nothing"
    assert "one process" in decided("method=side", processes=2).why
    assert "drop_path" in decided("method=side", "+backbone.kwargs.drop_path_rate=0.5").why
    monkeypatch.setattr(kept_features, "READ", 1.0)
    assert "would save 0 s" in decided("method=side", epochs=100).why, "the disk is slower than the blocks"
    monkeypatch.setattr(kept_features, "READ", 1e9)
    few = shutil._ntuple_diskusage(1 << 20, 0, 1 << 20)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: few)
    assert "a tenth of what is free" in decided("method=side", epochs=100).why


def test_kept_blocks_are_no_part_of_what_is_timed():
    with closing(timer_of(task_of(*LAST, "dataset.cache=features"))) as timer:
        assert timer.blocks == timer.attached.blocks[2:]
        shares = timer.shares(4)
        assert shares[:2] == [0, 0] and sum(shares) == pytest.approx(1) and min(shares[2:]) > 0
        kinds = kinds_of(timer, Candidate(4), 4)
        assert kinds and [kind.places for kind in kinds] == [[2, 3]]
        blocks = Blocks(timer, kinds)
        assert blocks(PLAIN, 4) and blocks.shares(PLAIN, 4) == [0, 0, 0.5, 0.5]


def test_blocks_that_no_gradient_passes_have_no_share_in_what_a_mode_costs():
    task = task_of(*LAST)
    progress = Progress("", None, "", quiet=True).__enter__()
    with closing(Timer(task.config, task.attached, (images_of(task), torch.arange(8)), CPU, progress)) as timer:
        assert timer.blocks == timer.attached.blocks and timer.shares(4)[:2] == [0, 0]
        kinds = kinds_of(timer, Candidate(4), 4)
        assert kinds and [kind.places for kind in kinds] == [[0, 1], [2, 3]], "all run"
        blocks = Blocks(timer, kinds)
        assert blocks(PLAIN, 4) and blocks.shares(PLAIN, 4) == [0, 0, 0.5, 0.5]


def test_exact_candidates_have_the_exact_gradient_behind_kept_blocks():
    with closing(timer_of(task_of(*LAST, "dataset.cache=features"))) as timer:
        cosine = Fidelity({None: timer}, None)
        for mode in MODES:
            found = cosine(Candidate(4, mode, 4, 4))
            assert found == pytest.approx(1.0, abs=1e-9) if mode.fidelity == EXACT else 0.9 < found < 1 - 1e-9, mode


def test_what_fits_behind_kept_blocks():
    task = task_of(*LAST, "dataset.cache=features", "backbone.image_size=64", "quant=none")
    stock = Candidate(32)
    assert task.needed(Candidate(32, RECOMPUTED, 2, 4)) == task.needed(stock), "the first two do not run"
    assert task.needed(Candidate(32, RECOMPUTED, 4, 4)) < task.needed(stock)
    assert task.needed(Candidate(4)) < task.needed(Candidate(8)) < task.needed(stock)
    assert task_of("method=side", "dataset.cache=features").modes(0.0) == [PLAIN], "no block runs"


def test_two_micro_batches_tell_the_peak_of_many_behind_kept_blocks():
    config = compose([*SHORT, *LAST, "dataset.cache=features", "backbone.image_size=64"])
    attached = attach(config, backbones.build(config.backbone, 10, meta=True))

    def peak(images: int) -> float:
        changed = replaced(config, {"optim.micro_batch": 4, "optim.batch_size": images})
        return Task(changed, attached, 10, images, 0.0).needed(Candidate(4))

    state = sum(t[0].numel() * t.element_size() for t in timer_of(task_of(*LAST, "dataset.cache=features",
        "backbone.image_size=64")).images.tensors)  # fmt: skip
    assert peak(16) - peak(8) == pytest.approx(8 * state, rel=0.05), "more images of a step are only there"


@pytest.mark.slow
@pytest.mark.predicts
@pytest.mark.parametrize("method", [LAST, ["method=side"]], ids=["tail", "branch"])
def test_a_planned_run_trains_on_kept_features(method, tmp_path, monkeypatch, capsys, quick_plans):
    monkeypatch.setenv("S2A_DATA", str(tmp_path))
    decision = kept_features.Decision(True, "is told to")
    monkeypatch.setattr(kept_features, "decide", lambda *arguments: decision)
    words = ["train", *SHORT, *method, f"run_dir={tmp_path}/run"]
    assert main([*words, *AUTO]) == 0
    assert "frozen blocks in every step" in capsys.readouterr().out
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["config"]["dataset"]["cache"] == "features" and list(Path(tmp_path, "taps").glob("*.taps"))
    assert result["plan"]["asked"]["dataset.cache"] == "auto"
    monkeypatch.setattr(trainer, "_train", None)  # nothing is trained again
    assert main([*words, *AUTO]) == 0
    assert "finished before" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setenv("S2A_DATA", str(tmp_path))
    assert main(["train", *SHORT, *method, *result["plan"]["choices"][0]["words"], f"run_dir={tmp_path}/same"]) == 0
    same = json.loads((tmp_path / "same/result.json").read_text())
    assert same["accuracy"] == result["accuracy"], "the words of a plan ask for the same"


@pytest.mark.predicts
@pytest.mark.parametrize("cache", ["auto", "features"])
def test_a_composition_is_planned_with_kept_features(cache, tmp_path, monkeypatch, capsys, quick_plans):
    monkeypatch.setenv("S2A_DATA", str(tmp_path))
    assert main(["plan", *SHORT, "method=side", "optim.epochs=50", "budget=1GiB", f"dataset.cache={cache}"]) == 0
    said = capsys.readouterr().out
    assert ("dataset.cache=features" in said) == (cache == "auto") and "stock PyTorch" in said
    assert not list(tmp_path.iterdir()), "nothing is kept yet"


TIGHT = ["backbone=vit_micro", "backbone.pretrained=false", "dataset.fraction=0.3", "dataset.scale=null", "device=cpu"]
TIGHT += ["method=s2a", "method.blocks=last:2", "optim.epochs=12", "budget=3.8MiB"]


@pytest.mark.slow
@pytest.mark.predicts
@pytest.mark.parametrize("cache", ["auto", "features"])
def test_features_are_not_kept_where_only_the_whole_model_fits(cache, tmp_path, monkeypatch, capsys, quick_plans):
    """What is kept of a batch may be more than its images."""
    monkeypatch.setenv("S2A_DATA", str(tmp_path))
    monkeypatch.setattr(kept_features, "decide", lambda *arguments: kept_features.Decision(True, "is told to"))
    code = main(["plan", *TIGHT, f"dataset.cache={cache}"])
    out, err = capsys.readouterr()
    if cache == "auto":
        assert code == 0 and "keeping features does not fit the budget" in out and "dataset.cache=null" in out
    else:
        assert code == 2 and "would fit, cheapest first: dataset.cache=null" in err


@pytest.mark.parametrize("method", [LAST, ["method=side"]], ids=["tail", "branch"])
def test_stored_weights_are_judged_by_the_features_that_they_make(method, tmp_path, monkeypatch, quick_plans):
    """The part that trains on kept features may hold no stored weights; what it reads was made by them."""
    monkeypatch.setenv("S2A_DATA", str(tmp_path))
    read, captured = [], kept_features.captured

    def noted(config, attached, images, device):
        read.append((attached, captured(config, attached, images, device)))
        return read[-1][1]

    monkeypatch.setattr(kept_features, "captured", noted)
    words = ["backbone.weights=auto", "dataset.cache=features", "budget=1GiB", "fidelity=0.99"]
    made = plan_run(prepare(compose([*SHORT, *method, *words])))
    assert made["settings"]["backbone.weights"] in ("fp32", "offload"), "others are no faster"
    if method == LAST:
        assert len({id(attached) for attached, _ in read}) == len(read) > 2, "those of fp32, offload, bf16, ..."
        assert not all(torch.equal(found.tensors[0], read[0][1].tensors[0]) for _, found in read)
    else:
        assert len(read) == 1, "no other weights are in a step"


def test_models_whose_blocks_can_not_be_kept_are_named(capsys):
    words = ["plan", "backbone=timm", "backbone.name=coat_tiny", "backbone.timm=coat_tiny", *SHORT[1:2], *SHORT[4:]]
    words += ["method=lora", "method.target=all", "method.blocks=last:1", "budget=900MiB", "dataset.cache=features"]
    assert main(words) == 2
    assert "compute with more than what" in capsys.readouterr().err


def test_weights_that_are_stored_otherwise_later_are_predicted_so():
    """As a plan does with the model of its run."""
    task = task_of("method=side", "dataset.cache=features")
    before = task.needed(Candidate(4))
    frozen_weights.store(task.attached.backbone, "int8", None)
    changed = replaced(task.config, {"backbone.weights": "int8"})
    stored = Task(changed, task.attached, 10, 32, 1000 * MIB).needed(Candidate(4))
    fresh = attach(changed, backbones.build(changed.backbone, 10))
    assert stored == Task(changed, fresh, 10, 32, 1000 * MIB).needed(Candidate(4)) < before


def test_auto_needs_a_budget(capsys):
    assert main(["train", *SHORT, "method=side", "dataset.cache=auto"]) == 2
    assert "dataset.cache=auto needs budget=SIZE" in capsys.readouterr().err
