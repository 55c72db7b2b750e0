"""benchmarks/tiers/tiers.py end to end on a CPU, and its parts that need a CUDA device without one."""

import json
import math
import sys
from types import SimpleNamespace

import kernel_check
import pytest
import rows
import tiers
import tiers_report
import torch

from s2a_cli import memory
from s2a_cli.activations.quant.primitives import PLAIN
from s2a_cli.common.errors import UserError

CPU = torch.device("cpu")
SHALLOW = ["backbone=vit_micro", "backbone.kwargs.depth=2", "backbone.checkpoint=null", "backbone.pretrained=false"]
WORDS = [*SHALLOW, "device=cpu", "batch=64", "time_batch=2", "gradient_batch=2", "steps=2"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Returns the result file of a few rows, one of which can't run."""
    out = tmp_path_factory.mktemp("results")

    def fails(backbone):
        raise UserError("this row always fails")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rows.BY_NAME, "lora", rows.Row("lora", "LoRA", ("method=linear",), change=fails))
        patch.setattr(tiers, "ROWS", [rows.BY_NAME[row.name] for row in rows.ROWS])
        names = "bias,bias-ckpt,bias-recompute,bias-offload,lora,T2,T3,T4,T5-T3-int8"
        tiers.main([*WORDS, f"rows={names}", f"out={out}", "name=tiny"])
    assert {path.suffix for path in out.iterdir()} >= {".json", ".md"}
    found = json.loads((out / "tiny.json").read_text())
    return found | {"by_name": {row["name"]: row for row in found["rows"]}, "markdown": (out / "tiny.md").read_text()}


def test_full_is_the_first_row_and_the_measure_of_all(result):
    assert result["rows"][0]["name"] == "full"  # though nobody asked for it
    ratios = result["rows"][0]["ratios"]
    assert ratios["predicted_peak"] == ratios["predicted_kept"] == ratios["images_per_second"] == 1


def test_ratios_are_those_of_the_figures(result):
    full = result["rows"][0]
    for row in result["rows"]:
        for part in ("kept", "peak") if row["predicted"] else ():
            expected = full["predicted"][f"{part}_mib"] / row["predicted"][f"{part}_mib"]
            assert row["ratios"][f"predicted_{part}"] == pytest.approx(expected)
        if row["images_per_second"]:
            assert row["images_per_second"] == pytest.approx(2 / (sum(row["seconds"]) / 2), rel=1e-4)  # median of two
            assert row["ratios"]["images_per_second"] == row["images_per_second"] / full["images_per_second"]


def test_memory_of_rows_is_in_its_order(result):
    kept = {name: row["predicted"]["kept_mib"] for name, row in result["by_name"].items() if row["predicted"]}
    assert kept["full"] > kept["bias"] > kept["T2"] > kept["T3"]
    assert kept["bias-ckpt"] == kept["bias-recompute"] < 0.6 * kept["bias"]
    assert kept["bias-offload"] < kept["T3"]
    assert all(
        row["predicted"]["kind"] == "predicted" and row["measured"] is None
        for row in result["rows"]
        if row["predicted"]
    )
    static = {name: result["by_name"][name]["predicted"]["static_mib"] for name in ("T3", "T5-T3-int8")}
    assert static["T5-T3-int8"] < 0.6 * static["T3"]


def test_gradients_against_exact_bias_tuning(result):
    by_name = result["by_name"]
    for name in ("full", "bias", "bias-ckpt", "bias-recompute"):
        assert by_name[name]["gradient"]["error"] < 1e-5, name
        assert by_name[name]["gradient"]["elements"] == by_name["bias"]["gradient"]["elements"]
    assert 1e-4 < by_name["T2"]["gradient"]["error"] < 0.1
    assert by_name["T3"]["gradient"]["error"] < by_name["T2"]["gradient"]["error"]
    assert by_name["T4"]["gradient"]["head_only"] and not by_name["T2"]["gradient"]["head_only"]


def test_a_row_that_fails_says_why_and_stops_nothing(result):
    row = result["by_name"]["lora"]
    assert row["problems"] == dict.fromkeys(("memory", "gradient", "speed"), "this row always fails")
    assert row["predicted"] is row["gradient"] is row["images_per_second"] is None
    assert "- `lora`, memory: this row always fails" in result["markdown"]
    assert list(result["by_name"]["bias-offload"]["problems"]) == ["speed"]
    assert result["by_name"]["T5-T3-int8"]["images_per_second"] > 0  # a row behind it


def test_the_file_describes_machine_and_settings(result):
    assert result["environment"]["threads"] == torch.get_num_threads() and result["environment"]["cores"] >= 1
    assert result["environment"]["torch"] == torch.__version__
    expected = {
        "backbone": "vit_micro",
        "batch": 64,
        "time_batch": 2,
        "precision": "fp32",
        "optimizer": "adamw",
        "image_size": 16,
    }
    assert {key: result[key] for key in expected} == expected
    assert result["images"] == "noise" and result["weights"] == "random"
    assert result["kernels"] is None


def test_markdown_shows_a_row_a_line(result):
    lines = [line for line in result["markdown"].splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(result["rows"])
    assert len({line.count("|") for line in lines}) == 1
    assert "predicted" in lines[0] and "measured" not in lines[0]


def test_figure(result, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no figure")
    tiers_report.figure(result, tmp_path / "tiny.png")
    assert (tmp_path / "tiny.png").stat().st_size > 10_000


def test_pareto():
    assert tiers_report.pareto([(3, 5), (1, 1), (2, 4), (2, 3), (4, 4)]) == [(1, 1), (2, 4), (3, 5)]


@pytest.mark.parametrize("name", ["lora", "lora-ckpt"])
def test_lora(name):
    pytest.importorskip("peft", reason="peft is not installed: no LoRA rows")
    made = rows.Made(rows.BY_NAME[name], SHALLOW, CPU)
    trained = {n for n, p in made.model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n} == {"head.weight", "head.bias"}
    assert len(trained) == 2 + 2 * 2  # A and B in each of two blocks
    found = rows.predicted(rows.BY_NAME[name], SHALLOW, 2)
    stock = rows.predicted(rows.BY_NAME["bias"], SHALLOW, 2)
    assert (found.kept_mib > stock.kept_mib) == (name == "lora")


def test_without_peft_the_row_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    entry = tiers.blank(rows.BY_NAME["lora"])
    tiers.predict_row(entry, SHALLOW, 2)
    assert entry["problems"] == {"memory": "needs a package that is not here: pip install peft"}


@pytest.mark.slow
def test_a_smaller_memory_budget_of_the_compiler_keeps_less():
    """Predicted without compiling: where the compiler cuts the graph says what is kept, not what the peak is."""
    row = rows.BY_NAME["bias-budget0.1"]
    some, few = (rows.predicted(r, SHALLOW, 3) for r in (rows.BY_NAME["bias-budget0.3"], row))
    whole = rows.predicted(rows.BY_NAME["bias"], SHALLOW, 3)
    assert few.kept_mib < some.kept_mib < whole.kept_mib and math.isnan(few.peak_mib)
    entry = tiers.blank(row)
    tiers.predict_row(entry, SHALLOW, 3)
    assert entry["predicted"]["peak_mib"] is None and list(entry["problems"]) == ["peak"]


def test_rows_start_from_the_same_weights():
    first, second = (rows.Made(rows.BY_NAME[name], SHALLOW, CPU) for name in ("full", "T3-s2a"))
    ours = dict(second.model.named_parameters())
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, ours[name]), name


def test_training_a_row_changes_no_other():
    first, second = (rows.Made(rows.BY_NAME["full"], SHALLOW, CPU) for _ in range(2))
    before = {name: p.clone() for name, p in second.model.named_parameters()}
    first(first.model, first.optimizer(), *tiers.noise(16, 2))
    third = rows.Made(rows.BY_NAME["full"], SHALLOW, CPU)
    changed = dict(first.model.named_parameters())
    assert all(torch.equal(p, before[name]) for made in (second, third) for name, p in made.model.named_parameters())
    assert not torch.equal(changed["head.weight"], before["head.weight"])


def test_rows_in_micro_batches():
    whole, micro = (rows.predicted(rows.BY_NAME[name], SHALLOW, 16) for name in ("bias", "bias-micro2"))
    images = 16 * 3 * 16 * 16 * 4 / 2**20
    assert micro.kept_mib - images < 0.2 * (whole.kept_mib - images)  # an eighth, and the gradients
    resnet = [
        "backbone=timm",
        "backbone.name=resnet10t",
        "backbone.timm=resnet10t",
        "backbone.image_size=32",
        "backbone.pretrained=false",
    ]
    with pytest.raises(UserError, match="BatchNorms that train see the whole batch"):
        rows.Made(rows.BY_NAME["full-micro8"], resnet, CPU, meta=True)


def test_photos_are_taken_from_all_over_the_folder(tmp_path):
    from PIL import Image

    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for index in range(4):
            Image.new("RGB", (40, 30), (index * 60, 0, 0)).save(tmp_path / label / f"{index}.png")
    made = rows.Made(rows.BY_NAME["linear"], ["backbone=vit_micro"], CPU, meta=True)
    images, targets = tiers.photos(str(tmp_path), made.config, made.backbone.image, 4)
    assert images.shape == (4, 3, 16, 16) and sorted(targets.tolist()) == [0, 0, 1, 1]
    with pytest.raises(UserError, match="8 photos found, at least 9 are needed"):
        tiers.photos(str(tmp_path), made.config, made.backbone.image, 9)


@pytest.mark.parametrize(
    "word, said",
    [
        ("rows=biass", "no row 'biass' (did you mean 'bias'?)"),
        ("batch=0", "batch=0: expected an integer of at least 1"),
        ("time=no", "time=no: expected true or false"),
        ("precison=bf16", "precison: no such setting"),
    ],
)
def test_bad_words_are_refused(word, said, tmp_path):
    with pytest.raises(UserError) as error:
        tiers.main(["backbone=vit_micro", word, f"out={tmp_path}"])
    assert said in str(error.value)


class FakeMeter:
    """Notes the order of the calls."""

    def __init__(self):
        self.calls = []
        self.memory = memory.Memory("measured-cuda", peak_mib=20.0, static_mib=3.0, kept_mib=10.0, reserved_mib=30.0)

    def __getattr__(self, name):
        return lambda: self.calls.append(name)


def test_measuring_follows_the_meters_protocol(monkeypatch):
    monkeypatch.setattr(memory, "is_idle", lambda device: True)
    meter = FakeMeter()
    found = tiers.measured(rows.BY_NAME["T2"], ["backbone=vit_micro"], 2, CPU, meter)
    steps = tiers.WARMUP_STEPS + tiers.MEASURED_STEPS
    assert meter.calls == ["step_begins", "after_forward", "step_ends"] * steps
    assert found == {
        "kind": "measured-cuda",
        "kept_mib": 10.0,
        "static_mib": 3.0,
        "peak_mib": 20.0,
        "reserved_mib": 30.0,
    }


def test_a_busy_device_is_not_measured(monkeypatch):
    monkeypatch.setattr(memory, "is_idle", lambda device: False)
    with pytest.raises(UserError, match="not idle"):
        tiers.measured(rows.BY_NAME["T2"], ["backbone=vit_micro"], 2, CPU, FakeMeter())


def test_each_row_is_measured_in_a_process_of_its_own(monkeypatch):
    commands, answers = [], []

    def run(command, **kwargs):
        commands.append(command)
        return answers.pop(0)

    monkeypatch.setattr(tiers.subprocess, "run", run)
    answers.append(
        SimpleNamespace(returncode=0, stdout='a warning\n{"kind": "measured-cuda", "peak_mib": 5.0}\n', stderr="")
    )
    entry = tiers.blank(rows.BY_NAME["T2"])
    tiers.measure_row(entry, ["backbone=vit_b", "batch=64"])
    assert entry["measured"] == {"kind": "measured-cuda", "peak_mib": 5.0}
    assert commands == [[sys.executable, tiers.__file__, "backbone=vit_b", "batch=64", "measure=T2"]]
    answers.append(
        SimpleNamespace(returncode=1, stdout="", stderr="Traceback\ntorch.OutOfMemoryError: CUDA out of memory\n\n")
    )
    entry = tiers.blank(rows.BY_NAME["T3"])
    tiers.measure_row(entry, [])
    assert entry["problems"] == {"measured": "torch.OutOfMemoryError: CUDA out of memory"} and entry["measured"] is None


def test_measured_figures_stand_before_predicted_ones():
    entries = [tiers.blank(rows.BY_NAME[name]) for name in ("full", "T2")]
    for entry, factor in zip(entries, (4, 1)):
        entry["predicted"] = {"kept_mib": 10 * factor, "peak_mib": 20 * factor}
        entry["measured"] = {"kept_mib": 11 * factor, "peak_mib": 24 * factor}
        entry["images_per_second"] = 100 / factor
    tiers.with_ratios(entries)
    assert entries[1]["ratios"]["measured_peak"] == entries[1]["ratios"]["predicted_kept"] == 4
    described = {"backbone": "b", "timm": "t", "image_size": 1, "batch": 1, "precision": "fp32", "optimizer": "sgd"}
    described |= {"weights": "random", "date": "d", "time_batch": None, "gradient_batch": None, "command": "c"}
    where = dict.fromkeys(("device", "cpu", "cores", "threads", "torch", "timm", "peft", "python"), "?")
    lines = tiers_report.markdown(described | {"environment": where, "rows": entries}).splitlines()
    head = next(line for line in lines if line.startswith("| row"))
    assert head.index("peak, measured") < head.index("kept, predicted")
    assert "24.0 (4.00x)" in next(line for line in lines if "`T2`" in line)


def test_operators_are_compared_with_their_twins():
    def wrong(x, *args):
        return PLAIN["multiply_dequantized"](x, *args) * 1.5

    made = rows.Made(rows.BY_NAME["T2"], SHALLOW, CPU)
    twins = kernel_check.Twins(
        ("quantize_elementwise", "multiply_dequantized"), PLAIN | {"multiply_dequantized": wrong}
    )
    with twins:
        made(made.model, made.optimizer(), *tiers.noise(16, 2))
    assert twins.worst == {"quantize_elementwise": 0.0, "multiply_dequantized": pytest.approx(1 / 3)}
