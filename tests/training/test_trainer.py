"""One run: the same seed gives the same numbers, a finished run tests the same again, a broken one says how it
ended.
"""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch
from again import figures_again
from omegaconf import OmegaConf

from s2a_cli.cli.main import main
from s2a_cli.common.errors import RunError, UserError
from s2a_cli.config.compose import compose, recompose
from s2a_cli.results import record, run_folder
from s2a_cli.training import forecast, loop, trainer
from s2a_cli.training import run as run_module
from s2a_cli.training import step as steps

QUICK = [
    *("dataset.val_fraction=0.05", "dataset.test_fraction=0.05"),  # 90 images each
    "dataset=digits", "dataset.shots=8", "backbone=vit_micro", "optim.epochs=2", "optim.batch_size=16", "device=cpu",
    "backbone.kwargs.depth=2", "backbone.pretrained=false",
]  # fmt: skip
WHOLE = ["backbone.kwargs.depth=6", "backbone.pretrained=true"]  # the weights that ship with s2a


@pytest.fixture(autouse=True)
def without_prediction(monkeypatch, request):
    """Predictions have tests of their own; here they would take most of the time."""
    if "predicts" not in request.keywords:
        memory = trainer.memory.Memory("predicted", 2.0, 1.0, 0.5, None, 4.0, "predicted")
        monkeypatch.setattr(forecast, "predict", lambda run: memory.as_dict())


def train(folder, *words):
    return trainer.train(compose([*QUICK, f"run_dir={folder}", *words]))[0]


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


@pytest.mark.predicts
def test_a_run_leaves_its_record(tmp_path):
    result = train(tmp_path / "run", "method=s2a")
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert result["status"] == "ok" and result["error"] is None
    assert result["memory"]["kind"] == "predicted" and result["memory"]["full_finetune_kind"] == "predicted"
    assert 0 < result["memory"]["kept_mib"] < result["memory"]["peak_mib"] < result["memory"]["full_finetune_peak_mib"]
    assert result["throughput"]["train_images_per_second"] > 0
    assert 0 <= result["accuracy"]["test_top1"] <= result["accuracy"]["test_top5"] <= 100
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [1, 2]
    assert result.keys() == record.Result.__annotations__.keys()
    assert result["memory"].keys() == record.MemoryRecord.__annotations__.keys()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        ".lock", "config.yaml", "metrics.jsonl", "result.json", "trainable.safetensors",
    }  # fmt: skip


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    words = ["method=s2a", "optim.mixup=0.2", "backbone.kwargs.drop_path_rate=0.2"]
    one, two = train(tmp_path / "1", *words), train(tmp_path / "2", *words)
    torch.rand(7)
    other = train(tmp_path / "3", *words, "seed=1")
    assert lines(tmp_path / "1") == lines(tmp_path / "2") != lines(tmp_path / "3")
    assert (tmp_path / "1/trainable.safetensors").read_bytes() == (tmp_path / "2/trainable.safetensors").read_bytes()
    assert one["id"] == two["id"] != other["id"]


def test_no_more_images_at_a_time_are_evaluated_than_trained(tmp_path, monkeypatch):
    seen, logits = [], steps.Step.logits

    def counted(self, model, images):
        seen.append(len(images))
        return logits(self, model, images)

    monkeypatch.setattr(steps.Step, "logits", counted)
    train(tmp_path, "method=bias", "quant=none", "optim.micro_batch=3", "optim.epochs=1")
    assert main(["eval", f"run={tmp_path}"]) == 0
    assert max(seen) == 3 and sum(seen) > 200


def test_a_micro_batch_changes_memory_and_not_the_result(tmp_path):
    train(tmp_path / "1", "quant=none")
    train(tmp_path / "2", "quant=none", "optim.micro_batch=3")
    for one, two in zip(lines(tmp_path / "1"), lines(tmp_path / "2")):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-3)


@pytest.mark.parametrize("method", ["full", "s2a"])
def test_a_finished_run_tests_the_same_again(tmp_path, method):
    result = train(tmp_path, f"method={method}")
    scores = figures_again(recompose(result["config"], []), tmp_path)
    assert scores["top1"] == result["accuracy"]["test_top1"] and scores["top5"] == result["accuracy"]["test_top5"]


def test_a_run_is_not_tested_with_other_tensors_or_data(tmp_path):
    result = train(tmp_path / "a", "method=bias", *WHOLE)
    with pytest.raises(UserError, match="not those of this backbone and method"):
        figures_again(recompose(result["config"], ["method.blocks=last:1"]), tmp_path / "a")
    with pytest.raises(UserError, match="which images it was tested on is not known"):
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        result["data"] |= {"revision": "other", "train": 7}
        record.write_result(tmp_path / "b", result)
        figures_again(compose([*QUICK, *WHOLE, "method=bias"]), tmp_path / "b")
    with pytest.raises(UserError, match="trained on backbone weights"):
        figures_again(recompose(result["config"], ["backbone.pretrained=false"]), tmp_path / "a")
    tensors = tmp_path / "a" / "trainable.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    with pytest.raises(UserError, match="trainable.safetensors: damaged"):
        figures_again(compose([*QUICK, "method=bias"]), tmp_path / "a")


@pytest.mark.parametrize(
    "error, status",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "oom"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_how_a_run_ended_is_recorded(tmp_path, monkeypatch, error, status):
    step, calls = steps.Step.__call__, []

    def fails_in_the_second_epoch(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 6:
            raise error
        return step(self, *args, **kwargs)

    monkeypatch.setattr(steps.Step, "__call__", fails_in_the_second_epoch)
    result = train(tmp_path)
    assert result["status"] == status and json.loads((tmp_path / "result.json").read_text())["status"] == status
    assert len(lines(tmp_path)) == 1
    scores = figures_again(recompose(result["config"], []), tmp_path)  # the best epoch so far is there
    assert 0 <= scores["top1"] <= 100


def test_a_loss_that_is_not_finite_fails_the_run(tmp_path):
    with pytest.raises(RunError, match="lower optim.lr"):
        train(tmp_path, "method=full", "optim.lr=1e30", "optim.name=sgd", "optim.warmup_epochs=0")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "failed" and "lower optim.lr" in result["error"]


@pytest.mark.parametrize("method, idle", [("[lst,res_tuning_bypass]", 16), ("[lst,side]", 0)])
def test_what_nothing_trains_is_said(tmp_path, capsys, method, idle):
    """The head reads LST's features alone: nothing reads what the bypass makes of the same blocks."""
    train(tmp_path, f"method={method}", "optim.epochs=1")
    said = [line for line in capsys.readouterr().err.splitlines() if "no gradient in the first step" in line]
    assert len(said) == bool(idle)
    assert all(line.startswith(f"s2a: {idle} of ") and "s2a.res_tuning_bypass" in line for line in said)


def test_a_folder_that_can_not_be_written_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run_dir=.*can't be written to"):
        train(tmp_path / "file" / "run")


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="device=cuda:3: not available here"):
        run_module.choose_device("cuda:3")


def test_weight_decay_spares_biases_norms_and_prompts():
    run = run_module.prepare(compose([*QUICK, "method=s2a", "optim.weight_decay=0.1"]))
    optimizer = steps.make_optimizer(run.config.optim, run.model, run.attached)
    names = {id(p): name for name, p in run.model.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    spared = {names[id(p)] for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    assert "head.weight" in decayed and "s2a.side.readers.0.classifier.weight" in decayed
    assert {"head.bias", "s2a.prompt.0.A", "s2a.prompt.0.B", "s2a.side.readers.0.norm.weight"} <= spared
    assert not any(name.endswith(("bias", ".A", ".B")) or "norm" in name for name in decayed)
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    scales = {name: run.config.method[name].lr_scale for name in ("prompt", "side")}
    assert 1 not in scales.values()
    scale = {name: scales.get(name.split(".")[1], 1) if name.startswith("s2a.") else 1 for name in rates}
    assert rates == {name: run.config.optim.lr * scale[name] for name in rates}


def test_the_head_may_learn_at_a_rate_of_its_own():
    run = run_module.prepare(compose([*QUICK, "method=bias", "optim.lr=1e-3", "optim.head_lr=3e-2"]))
    groups = steps.make_optimizer(run.config.optim, run.model, run.attached).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    own = {id(p) for p in run.backbone.head.parameters()}
    assert own <= rates.keys() and len(own) < len(rates)
    assert all(rate == pytest.approx(3e-2 if p in own else 1e-3) for p, rate in rates.items())


@pytest.mark.parametrize("precision", ["amp-bf16", "amp-fp16", "bf16"])
def test_low_precision_trains_and_tests_the_same_again(tmp_path, precision):
    words = [f"precision={precision}", "method=s2a", "optim.clip_grad=1.0", "dataset.shots=24", *WHOLE]
    result = train(tmp_path, *words)
    assert lines(tmp_path)[-1]["train_loss"] < lines(tmp_path)[0]["train_loss"]
    scores = figures_again(recompose(result["config"], []), tmp_path)
    assert scores["top1"] == result["accuracy"]["test_top1"] > 30


def test_learning_rate_rises_and_falls():
    factor = loop.lr_factor(compose(["optim.epochs=10", "optim.warmup_epochs=2"]).optim, 5)
    rates = [factor(step) for step in range(50)]
    assert rates[:10] == sorted(rates[:10]) and rates[0] > 0 and rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.01
    constant = loop.lr_factor(compose(["optim.schedule=constant", "optim.warmup_epochs=0"]).optim, 5)
    assert {constant(step) for step in range(50)} == {1.0}


def test_mixing_makes_soft_targets():
    torch.manual_seed(0)  # some draws mix nothing
    images, targets = torch.randn(8, 3, 4, 4), torch.arange(8)
    for words in (["optim.mixup=0.4"], ["optim.cutmix=1.0"], ["optim.mixup=0.4", "optim.cutmix=1.0"]):
        mixed, soft = loop.mixing(compose(words).optim, 8)(images, targets)
        assert soft.shape == (8, 8) and torch.allclose(soft.sum(1), torch.ones(8)) and not torch.equal(mixed, images)
    same, hard = loop.mixing(compose([]).optim, 8)(images, targets)
    assert same is images and hard is targets


def test_what_codes_are_fitted_to_is_saved_and_the_same_in_every_run(tmp_path):
    saved = []
    for name in ("1", "2"):
        train(tmp_path / name, "method=bias", "quant=int4")
        tensors = safetensors.torch.load_file(tmp_path / name / "trainable.safetensors")
        saved.append({key: tensor for key, tensor in tensors.items() if key.startswith("calibration.")})
    assert len(saved[0]) > 6 and saved[0].keys() == saved[1].keys()
    for key, tensor in saved[0].items():
        assert torch.equal(tensor, saved[1][key])
    train(tmp_path / "fixed", "method=bias", "quant=int4", "quant.calibrate=false")
    assert not [
        k
        for k in safetensors.torch.load_file(tmp_path / "fixed/trainable.safetensors")
        if k.startswith("calibration.0")
    ]


@pytest.mark.slow
@pytest.mark.xdist_group("compiled")  # the compiler starts once
@pytest.mark.parametrize(
    "words",
    [("method=s2a", "quant=none"), ("method=full",)],
    ids=" ".join,
)
def test_a_compiled_run_computes_the_same(tmp_path, words):
    words = [
        *words,
        "optim.epochs=1",
        "dataset.shots=4",
        "backbone.kwargs.depth=1",
        "backbone.pretrained=false",
        "test=false",
        # All batches alike, 40 images to train on and 20 to validate: it is compiled once for each.
        *(["optim.batch_size=20", "dataset.val_fraction=0.012"] if "method=s2a" in words else []),
    ]
    train(tmp_path / "eager", *words), train(tmp_path / "compiled", *words, "compile=true")
    eager, compiled = lines(tmp_path / "eager")[0], lines(tmp_path / "compiled")[0]
    assert compiled == pytest.approx(eager, rel=1e-3)


def test_a_budget_for_the_compiler_reaches_it(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda _: seen.append(torch._functorch.config.activation_memory_budget)
    )
    words = ["method=bias", "quant=none", "compile=true"]
    assert train(tmp_path / "a", *words, "compile_budget=0.3")["memory"] is None
    train(tmp_path / "b", *words)
    assert seen == [0.3, 1.0]


@pytest.mark.parametrize("rate", ["drop_path_rate", "proj_drop_rate", "pos_drop_rate"])
def test_a_budget_for_the_compiler_is_refused_where_random_numbers_are_drawn(tmp_path, rate):
    words = ["method=bias", "quant=none", "compile=true", f"+backbone.kwargs.{rate}=0.1"]
    with pytest.raises(
        UserError, match=r"compile_budget=0.5: this model draws random numbers in training \(bernoulli_"
    ):
        train(tmp_path, *words, "compile_budget=0.5")


@pytest.mark.parametrize("word", ["optim.micro_batch=8", "quant.chunks=2", "quant.recompute=block"])
def test_parts_of_a_batch_with_moving_statistics_are_refused(word):
    words = ["backbone=resnet18", "backbone.pretrained=false", "backbone.image_size=32", word]
    with pytest.raises(UserError, match=f"{word} changes the result"):
        run_module.prepare(compose([*QUICK[:2], *words, "method=full"]))


def test_a_run_with_settings_of_single_blocks_tests_the_same_again(tmp_path):
    result = train(tmp_path, "quant.blocks={1: {recompute: block, input: 8}}", "optim.epochs=1")
    stored = record.read_result(tmp_path)
    assert stored["config"] == result["config"] and stored["config"]["quant"]["blocks"][1]["input"] == 8
    assert figures_again(recompose(stored["config"], []), tmp_path)["top1"] == result["accuracy"]["test_top1"]


def test_a_block_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="quant.blocks: there is no block 99; this backbone has those from 0 to"):
        run_module.prepare(compose([*QUICK, "quant.blocks={99: {norm: 8}}"]))


def test_an_earlier_run_stays_until_another_is_whole_and_goes_by_force_alone(tmp_path, monkeypatch):
    old = train(tmp_path, *WHOLE)
    with pytest.raises(UserError, match="holds a finished run of another config .seed=0, here 1.; --force replaces it"):
        train(tmp_path, "seed=1", *WHOLE)

    def fails(self, state):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.TrainLoop, "__call__", fails)
        result = trainer.train(compose([*QUICK, *WHOLE, f"run_dir={tmp_path}", "seed=1"]), force=True)[0]
    assert result["status"] == "interrupted" and record.read_result(tmp_path) == old
    assert len(lines(tmp_path)) == 2 and (tmp_path / "trainable.safetensors").exists()
    new = train(tmp_path, "seed=1", *WHOLE)
    assert record.read_result(tmp_path)["id"] == new["id"] != old["id"] and not (tmp_path / run_folder.NEXT).exists()


def test_the_same_line_on_a_finished_run_says_so_and_trains_nothing(tmp_path, monkeypatch, capsys):
    result = train(tmp_path)
    monkeypatch.setattr(trainer.TrainLoop, "__call__", lambda *args: pytest.fail("trained again"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["train", *QUICK, f"run_dir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert f"finished before, nothing is trained; --force trains it anew: {tmp_path}" in said
    assert f"{result['accuracy']['test_top1']:.2f}" in said and said.endswith(f"\nrun: {tmp_path}\n")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_holds_no_run_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "prepare", lambda config: pytest.fail("too late"))
    for name in (".env.template", "result.json", "notes.txt"):
        (tmp_path / name).write_text("mine")
    assert main(["train", *QUICK, "run_dir=."]) == 2
    said = capsys.readouterr().err
    assert (
        said
        == "s2a: run_dir=.: holds .env.template, notes.txt, result.json, and no run; set run_dir= to a new or an empty"
        " folder, or to that of a run\n"
    )
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        (".env.template", "result.json", "notes.txt"), "mine"
    )


def test_another_split_is_refused_in_eval(tmp_path):
    result = train(tmp_path)
    with pytest.raises(UserError, match="dataset.split_seed=1: the run was made with 0"):
        figures_again(recompose(result["config"], ["dataset.split_seed=1"]), tmp_path)


def test_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, "tensorboard=true")
    board = events.EventAccumulator(str(tmp_path)).Reload()
    for key in ("val_top1", "train_loss", "lr"):
        written = [event.value for event in board.Scalars(key)]
        assert written == pytest.approx([line[key] for line in lines(tmp_path)], rel=1e-6)


def test_identity_leaves_out_where_a_run_lives():
    base = compose(QUICK)
    same = compose([*QUICK, "workers=3", "run_dir=/elsewhere", "tensorboard=true", "dataset.root=/data"])
    other = compose([*QUICK, "method.prompt.rank=4"])

    def run_id(config, revision="revision", weights="weights"):
        return record.run_id(record.content(OmegaConf.to_container(config), revision, weights))

    assert run_id(base) == run_id(same) != run_id(other)
    older = OmegaConf.to_container(base)  # of a version without these settings
    del older["method"]["segments"], older["optim"]["head_lr"]
    assert run_id(OmegaConf.create(older)) == run_id(base) != run_id(compose([*QUICK, "method.segments=2"]))
    assert run_id(base, "other") != run_id(base) != run_id(base, weights="other")


@pytest.mark.slow
@pytest.mark.predicts
def test_real_photos(real_data, tmp_path):
    """Real weights and photos, a few epochs: well above chance (14 %), and S2A does better on validation than the
    linear probe.
    """
    weights = real_data / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    words = [
        "experiment=photos_112",
        f"backbone.checkpoint={weights}",
        f"dataset.root={real_data}/pacs/cartoon",
        "device=cpu",
    ]
    top1, loss = {}, {}
    for method in ("linear", "s2a"):
        result = trainer.train(
            compose(
                [*words, f"method={method}", f"run_dir={tmp_path / method}", "optim.epochs=4", "optim.batch_size=16"]
            )
        )[0]
        top1[method], loss[method] = result["accuracy"]["test_top1"], lines(tmp_path / method)[-1]["val_loss"]
    assert top1["linear"] > 40 and top1["s2a"] > 50
    assert loss["s2a"] < loss["linear"]
