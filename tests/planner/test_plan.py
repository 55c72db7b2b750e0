"""Plans of real steps: what they predict, what they leave as it is, and how a run keeps its plan."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from s2a_cli import backbones
from s2a_cli.cli.main import main
from s2a_cli.common.errors import UserError
from s2a_cli.common.progress import Progress
from s2a_cli.config.compose import compose
from s2a_cli.config.settings import replaced
from s2a_cli.memory.result import MIB
from s2a_cli.planner.candidates import EXACT, MODES, PLAIN, RECOMPUTED, Candidate
from s2a_cli.planner.fidelity import Fidelity
from s2a_cli.planner.run_plan import plan_run
from s2a_cli.planner.task import Task
from s2a_cli.planner.timer import Timer, Timers
from s2a_cli.results import record
from s2a_cli.training import forecast, trainer
from s2a_cli.training.run import attach, prepare

TINY = [
    *("backbone=vit_micro", "backbone.pretrained=false", "+backbone.kwargs.depth=2", "dataset.shots=4", "device=cpu"),
    *("optim.batch_size=32", "optim.epochs=1", "method=bias"),
]
FEW = "optim.batch_size=8"  # few ways to cut it: a plan is searched for in half the time
CPU = torch.device("cpu")


CNN = ["backbone=resnet18", "backbone.image_size=32", *TINY[1:2], *TINY[3:-1], "method=full"]


def task_of(*words: str, available: float = 1000 * MIB, base: list[str] = TINY) -> Task:
    config = compose([*base, *words])
    torch.manual_seed(0)
    return Task(config, attach(config, backbones.build(config.backbone, 10)), 10, 32, available)


def timer_of(task: Task) -> Timer:
    size = task.attached.backbone.image.size
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    progress = Progress("", None, "", quiet=True).__enter__()
    return Timer(task.config, task.attached, (images, torch.arange(8)), CPU, progress)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.about)
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_words_of_a_candidate_ask_for_its_settings(mode, blocks):
    candidate = Candidate(8, mode, blocks, 2)
    asked = compose([*TINY, *candidate.words(32)])
    planned = replaced(compose(TINY), candidate.settings(32))
    assert OmegaConf.to_container(asked, resolve=True) == OmegaConf.to_container(planned, resolve=True)


@pytest.mark.parametrize("words", [["quant=none"], ["quant=tiny"], ["quant=int4", "method=full"]])
def test_two_micro_batches_tell_the_peak_of_many(words):
    config = compose([*TINY, *words, "optim.micro_batch=4"])
    attached = attach(config, backbones.build(config.backbone, 10, meta=True))
    short = forecast.profile_step(attached, config, 32)
    config.optim.micro_batch = None
    pixels = attached.backbone.image.size
    long = torch.empty(32, 3, pixels, pixels, dtype=torch.uint8), torch.empty(32).long()
    step = forecast.Step(replaced(config, {"optim.micro_batch": 4}), CPU, attached)
    whole = forecast.memory.profile(
        attached.model, long, step, lambda model: forecast.make_optimizer(config.optim, model, attached)
    )
    assert short.peak_bytes == pytest.approx(whole.peak_bytes, abs=8 * 512)  # each allocation is rounded up


def test_exact_candidates_have_the_exact_gradient_and_codes_less():
    task = task_of()
    with closing(timer_of(task)) as timer:
        cosine = Fidelity({None: timer}, None)
        found = {mode: cosine(Candidate(4, mode, 2, 2)) for mode in MODES}
    for mode, value in found.items():
        assert value == pytest.approx(1.0, abs=1e-9) if mode.fidelity == EXACT else 0.9 < value < 1 - 1e-9, mode.about


def test_a_gradient_that_fp16_overflows_by_its_scale_is_compared_at_a_smaller_one():
    task = task_of("precision=amp-fp16")
    with closing(timer_of(task)) as timer:
        coded = next(mode for mode in MODES if mode.fidelity < EXACT)
        candidates = [Candidate(4, PLAIN, 0, 2), Candidate(4, coded, 2, 2)]
        for candidate in candidates:
            timer.step(candidate).scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
        assert 0.9 < Fidelity({None: timer}, None)(candidates[1]) < 1
        nn.init.constant_(timer.attached.backbone.head.layers["head"].bias, torch.nan)  # no scale mends that
        assert Fidelity({None: timer}, None)(candidates[1]) == -1


def test_what_can_not_be_predicted_can_not_be_planned(monkeypatch):
    def refuses(*_):
        raise NotImplementedError("aten.odd.default can't be run without data")

    monkeypatch.setattr(forecast, "profile_step", refuses)
    with pytest.raises(UserError, match="with method=bias can't be predicted: NotImplementedError"):
        plan_run(prepare(compose([*TINY, "budget=1GiB"])))


def test_one_model_at_a_time_is_on_the_device(monkeypatch):
    there: dict[nn.Module, str] = {}
    monkeypatch.setattr(nn.Module, "to", lambda model, device: there.__setitem__(model, str(device)))

    def made(weights: str | None) -> Timer:
        timer = timer_of(task_of())
        timer.device = torch.device("meta")
        return timer

    with closing(Timers(made)) as timers:
        for weights in ("fp32", "int8", "int8", "fp32", "nf4", "fp32"):
            timer = timers[weights]
            assert there[timer.attached.model] == "meta"
            assert list(there.values()).count("meta") == 1
    assert len(timers) == len(there) == 3


def test_a_timer_leaves_the_model_as_it_was():
    task = task_of(base=CNN)
    before = {name: tensor.clone() for name, tensor in task.attached.model.state_dict().items()}
    with closing(timer_of(task)) as timer:
        timer(Candidate(4), 4)
        moved = task.attached.model.state_dict()
        assert not all(torch.equal(moved[name], tensor) for name, tensor in before.items()), "BatchNorms saw images"
    after = task.attached.model.state_dict()
    counts = [name for name in before if name.endswith("num_batches_tracked")]
    assert counts and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in task.attached.model.parameters())


def test_batch_norms_that_train_keep_the_batch_whole():
    task = task_of(base=CNN)
    assert task.whole and task.room().sizes == [32]
    assert not any(mode.recomputes or mode.fidelity < 1 for mode in task.modes(0.99))


def test_a_run_keeps_its_plan(tmp_path, capsys, quick_plans, monkeypatch):
    words = [*TINY, "budget=2.5MiB", f"run_dir={tmp_path}"]
    assert main(["train", *words]) == 0
    out, result = capsys.readouterr().out, record.read_result(tmp_path)
    found = result["plan"]
    assert found and "the same without planning: quant=" in out and found["choices"][0]["about"] in out
    assert found["choices"][0]["needed_mib"] <= 2.5 and result["memory"]["peak_mib"] <= 2.5
    assert result["config"]["optim"]["micro_batch"] == found["settings"]["optim.micro_batch"] < 32
    assert result["config"]["budget"] == "2.5MiB" and found["asked"]["optim.micro_batch"] is None
    assert result["id"] == record.run_id(record.content_of(result)), "a run is known by what was asked for"
    assert main(["train", *words]) == 0 and "finished before" in capsys.readouterr().out
    broken = json.loads((tmp_path / "result.json").read_text()) | {"status": "interrupted"}
    broken["plan"]["seconds"], partly = 12345.0, {"recompute": "block"}  # in some blocks
    broken["plan"]["settings"]["quant"] |= {"recompute": "none", "blocks": {"1": partly}}
    (tmp_path / "result.json").write_text(json.dumps(broken))
    assert main(["train", *words]) == 0
    again = record.read_result(tmp_path)
    assert again["plan"]["seconds"] == 12345.0 and again["config"]["quant"]["blocks"] == {1: partly}
    assert main(["train", *words, "--force"]) == 0 and record.read_result(tmp_path)["plan"]["seconds"] < 12345.0
    assert main(["eval", f"run={tmp_path}"]) == 0


def test_a_run_without_a_planner_says_so(tmp_path):
    with pytest.raises(UserError, match="budget=2MiB: this run has no plan"):
        trainer.train(compose([*TINY, "budget=2MiB", f"run_dir={tmp_path}"]))


def test_codes_are_taken_below_what_exact_plans_need(quick_plans):
    exact = task_of("backbone.kwargs.depth=3", FEW)
    least = min(map(exact.needed, exact.smallest(1.0)))
    coded = min(map(exact.needed, exact.smallest(0.999)))
    assert coded < least
    budget = f"budget={(coded + 0.9 * (least - coded)) / MIB}MiB"
    with pytest.raises(UserError, match=r"nothing fits; with fidelity=exact .* cheapest first: fidelity=0.999 \("):
        plan_run(prepare(compose([*TINY, "backbone.kwargs.depth=3", FEW, budget])))
    found = plan_run(prepare(compose([*TINY, "backbone.kwargs.depth=3", FEW, budget, "fidelity=0.999"])))
    assert 0.999 <= found["choices"][0]["fidelity"] < 1 and found["settings"]["optim.micro_batch"] == 1


@pytest.mark.parametrize("method", ["bias", "prompt"])  # which draws no number, and does, before other weights are made
def test_weights_are_chosen_where_they_may_be(tmp_path, quick_plans, capsys, method):
    task = task_of(f"method={method}", FEW)
    budget = f"budget={0.8 * min(map(task.needed, task.smallest(0.99))) / MIB}MiB"
    words = [*TINY, f"method={method}", FEW, budget, "fidelity=0.99", f"run_dir={tmp_path}"]
    assert main(["train", *words]) == 2 and "backbone.weights=" in capsys.readouterr().err
    assert main(["train", *words, "backbone.weights=auto"]) == 0
    result = record.read_result(tmp_path)
    assert result["config"]["backbone"]["weights"] in ("int8", "nf4", "bf16")
    assert result["plan"]["asked"]["backbone.weights"] == "auto"
    assert main(["eval", f"run={tmp_path}"]) == 0


def test_blocks_are_recomputed_where_weights_are_stored_otherwise_and_nothing_else_fits(quick_plans):
    task = task_of("backbone.kwargs.depth=6", FEW, "backbone.weights=auto", "budget=1MiB")
    plain, recomputed = (
        task.needed(Candidate(1, mode, blocks, 6, "offload")) for mode, blocks in ((PLAIN, 0), (RECOMPUTED, 6))
    )
    assert recomputed < plain < min(task.needed(one) for one in task.smallest(1.0) if one.weights == "fp32")
    budget = f"budget={(plain + recomputed) / 2 / MIB}MiB"
    found = plan_run(prepare(compose([*TINY, "backbone.kwargs.depth=6", FEW, "backbone.weights=auto", budget])))
    assert found["settings"]["backbone.weights"] == "offload" and found["settings"]["optim.micro_batch"] == 1
    quant = found["settings"]["quant"]
    assert quant["recompute"] == "block" or quant["blocks"]


def test_memory_with_a_budget_plans_too(quick_plans, capsys):
    assert main(["memory", *TINY, "budget=2.5MiB", "format=json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["peak_mib"] <= 2.5 and found["plan"]["choices"][0]["needed_mib"] == pytest.approx(
        found["peak_mib"], abs=0.1
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["budget=6GB"], "a size above 0 in MiB or GiB"),
        (["budget=0GiB"], "a size above 0 in MiB or GiB"),
        (["budget=6GiB", "fidelity=0.9"], "expected one of exact, 0.999, 0.99"),
        (["fidelity=0.99"], "fidelity=0.99 needs budget=SIZE"),
        (["backbone.weights=auto"], "backbone.weights=auto needs budget=SIZE"),
        (["budget=6GiB", "quant=int4"], "quant=int4: budget= chooses it"),
        (["budget=6GiB", "optim.micro_batch=4"], "optim.micro_batch=4: budget= chooses it"),
        (["budget=6GiB", "compile=true", "experiment=full_baseline"], "compile=true goes without budget="),
        (["quant=auto", "quant.budget_mib=900"], "is budget=SIZE now, such as budget=900MiB fidelity=0.999"),
        (["quant.budget_mib=900"], "is budget=SIZE now"),
    ],
)
def test_words_that_do_not_go_together_are_one_line(words, said, capsys):
    assert main(["validate", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1


def test_a_plan_needs_a_budget(capsys):
    assert main(["plan"]) == 2 and "budget=SIZE is needed" in capsys.readouterr().err


def test_all_blocks_recomputed_is_checkpointing():
    quant = Candidate(4, RECOMPUTED, 2, 2).quant
    assert (quant.recompute, quant.input, quant.lossless, quant.bits) == ("block", None, False, None)
