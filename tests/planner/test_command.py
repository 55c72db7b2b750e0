"""`s2a memory`: its output, what fits, and bad input."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from s2a_cli.cli.main import main
from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.memory.margin import Margin, outlook
from s2a_cli.memory.result import MIB
from s2a_cli.planner.batch_size import device_size, largest_batch, resolved
from s2a_cli.planner.report import _merged
from s2a_cli.planner.run_memory import Composition, Predictor, sizes
from s2a_cli.planner.search import largest
from s2a_cli.planner.sizes import size

SMALL = ["backbone=vit_t", "backbone.image_size=64", "dataset=cifar10", "optim.batch_size=16"]
GIB = 1024 * MIB


@pytest.fixture
def s2a(capsys):
    def run(*words):
        code = main(["memory", *SMALL, *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_one_composition(s2a):
    code, out, _ = s2a("method=bias", "quant=none")
    assert code == 0 and "predicted, not measured" in out
    full, mine = (
        float(re.search(pattern, out)[1].replace(",", ""))
        for pattern in (r"fine-tuning \(([\d.,]+) MiB", r"peak ([\d.,]+) MiB")
    )
    assert full > mine > 0
    line = next(line for line in out.splitlines() if line.startswith("sum"))
    assert [float(number.replace(",", "")) for number in line.split()[1:]] == [mine, full]


@pytest.mark.slow
@pytest.mark.parametrize("word, code", [("format=json", 0), ("fit=8Gb", 2)])
def test_as_a_process_all_is_said(word, code):
    command = [sys.executable, "-m", "s2a_cli", "memory", *SMALL, "method=linear", "quant=none", word]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr == "" and json.loads(done.stdout) if code == 0 else len(done.stderr.splitlines()) == 1


def test_json_and_csv_hold_parts_that_add_up(s2a):
    _, out, _ = s2a("method=s2a", "format=json")
    (found,) = json.loads(out)
    assert sum(part["mib"] for part in found["parts"]) == pytest.approx(found["peak_mib"], abs=1e-9)
    assert (
        found["kind"] == "predicted" and found["classes"] == 10 and found["full_finetune_peak_mib"] > found["peak_mib"]
    )
    _, out, _ = s2a("method=s2a", "format=csv")
    lines = list(csv.DictReader(io.StringIO(out)))
    assert sum(int(line["bytes"]) for line in lines) == round(found["peak_mib"] * MIB)


def test_several_compositions_are_compared(s2a, tmp_path):
    figure = tmp_path / "memory.svg"
    code, out, _ = s2a("method=linear,bias", "quant=none,exact", f"figure={figure}")
    assert code == 0 and figure.read_text().startswith("<?xml")
    names = [line.split("  ")[0] for line in out.splitlines() if line.startswith("method=") and ":" not in line]
    assert len(names) == 4 and names[0] == "method=linear quant=none"


def test_the_figure_of_one(s2a, tmp_path):
    assert s2a("method=bias", f"figure={tmp_path / 'one.png'}")[0] == 0
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "word, said",
    [
        ("fit=8Gb", "MiB or GiB"),
        ("fit=-8GiB", "above 0"),
        ("fit=0GiB", "above 0"),
        ("fit=cuda:99", "CUDA device" if not torch.cuda.is_available() else "there are cuda:0"),
        ("context=1", "context=600MiB".partition("=")[0]),
        ("fragmentation=1.5", "share of what the allocator takes"),
        ("expandable_segments=yes", "expected true or false"),
        ("snapshot=missing.pickle", "takes no other word"),
        ("processes=0", "at least 1"),
        ("processes=17", "can't be shared by 17 processes"),
        ("format=xml", "expected one of terminal, json, csv"),
        ("figure=a.bmp", "ends in one of .png"),
        ("optim.batch_size=0", "at least 1"),
        ("optim.batch_size=-3", "at least 1"),
        ("optim.batchsize=3", "did you mean"),
        ("backbone.image_size=8", "can't take it"),
        ("device=cuda:99", "not available here"),
        ("compile=true quant=none", "can't be predicted"),
        ("quant=auto quant.budget_mib=500", "budget=900MiB fidelity=0.999"),
        ("budget=1MiB +backbone.kwargs.depth=2", "nothing fits"),
        ("method=interval(0,1)", "interval"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(s2a, word, said):
    code, out, err = s2a(*word.split())
    assert code == 2 and out == "" and said in err
    assert len(err.strip().splitlines()) == 1 and err.startswith("s2a: ")


def needed(batch, config, margin=Margin()):
    return margin.needed(Predictor()(Composition.of(OmegaConf.merge(config, {"optim": {"batch_size": batch}}))))


@pytest.mark.parametrize(
    "words", [["method=bias", "quant=none"], pytest.param(["method=s2a", "quant=tiny"], marks=pytest.mark.slow)]
)
def test_the_largest_batch_fits_and_one_more_does_not(words):
    config, margin = compose([*SMALL, *words]), Margin(context=0)
    available = 400 * MIB
    found = largest_batch(config, available, margin)
    assert found > 1 and needed(found, config, margin) <= available < needed(found + 1, config, margin)
    assert largest_batch(config, 30 * MIB, margin) == 0
    config.dataset.shots = 2
    assert largest_batch(config, 100 * GIB, margin) == 20  # all there are


def test_a_batch_of_batch_norms_begins_with_two_images_where_one_leaves_no_variance():
    words = ["backbone=resnet18", "backbone.image_size=32", "backbone.pretrained=false", "dataset=cifar10"]
    config, margin = compose([*words, "method=full", "quant=none"]), Margin(context=0)
    assert largest_batch(config, 1200 * MIB, margin) > 64 and largest_batch(config, 100 * MIB, margin) == 0


def test_full_fine_tuning_is_compared_with_as_stock_pytorch_runs_it():
    words = [*SMALL, "method=bias", "quant=none"]
    blocks = "quant.blocks={0: {recompute: block}, 1: {input: 8}}"
    plain, mixed = (Predictor().full(Composition.of(compose([*words, *more]))).memory for more in ([], [blocks]))
    assert mixed == plain


@pytest.mark.parametrize("limit", [0, 1, 7, 100, 12345])
@pytest.mark.parametrize(
    "shape", [lambda n: n, lambda n: 10 + n + 5 * (n % 2 == 0) // 5, lambda n: n**1.3, lambda n: 64 * -(-n // 64)]
)
def test_the_search_is_exact_and_short(limit, shape):
    calls = []

    def need(count):
        calls.append(count)
        return shape(count)

    found = largest(need, limit, most=5000)
    assert found == max((count for count in range(1, 5001) if shape(count) <= limit), default=0)
    assert len(calls) <= 25


@pytest.mark.slow
def test_what_would_make_a_batch_fit(s2a):
    shallow = ["+backbone.kwargs.depth=3", "optim.batch_size=1024", "dataset=cifar100", "method=bias", "quant=none"]
    _, out, _ = s2a(*shallow, "fit=1300MiB", "format=json")
    fit = json.loads(out)[0]["fit"]
    assert fit["needed_mib"] > fit["available_mib"] == 1300 and 0 < fit["largest_batch"] < 1024
    options = [(option["words"], option["needed_mib"], option["fits"]) for option in fit["options"]]
    assert options[0][0][0] == "quant=none" and options[0][0][1].startswith("optim.micro_batch="), "exact ones first"
    assert ["method=side"] in [words for words, _, _ in options] and sum(fits for *_, fits in options) > 3
    words = [word for word in SMALL if "dataset" not in word and "batch" not in word]
    config = compose([*words, *shallow, *options[0][0]])
    assert options[0][1] * MIB == needed(1024, config)
    _, out, _ = s2a("method=bias", "fit=8GiB")
    assert "batch 16 fits" in out and "would change it" not in out


def test_sizes():
    assert size("fit", "1.5GiB") == 1536 * MIB and device_size("512MiB") == 512 * MIB
    for text in ("8", "8G", "8 GiB", "GiB", "nanGiB", "8gib"):
        with pytest.raises(UserError, match="fit=8GiB"):
            size("fit", text)


def test_what_is_known_of_data_sets(tmp_path):
    def of(*words):
        return sizes(compose(["backbone=vit_t", *words]).dataset)

    assert of("dataset=cifar100") == (100, 45_000, None)
    assert of("dataset=flowers102", "dataset.shots=2") == (102, 204, None)
    assert of("dataset=domainnet", "dataset.domain=sketch", "dataset.fraction=0.5")[0] == 345
    for name in ("cat", "dog", "owl"):
        (tmp_path / "train" / name).mkdir(parents=True)
    assert of("dataset=folder", f"dataset.root={tmp_path}")[0] == 3
    classes, _, assumed = of("dataset=folder", f"dataset.root={tmp_path / 'elsewhere'}")
    assert f"{classes} classes" in assumed


def test_the_digits_are_as_many_as_predicted_with():
    from s2a_cli import data

    config = compose([]).dataset
    found = data.load(config)
    assert sizes(config)[:2] == (len(found.classes), pytest.approx(len(found.train), abs=10))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_auto_needs_a_device():
    assert resolved(["method=bias"]) == ["method=bias"]
    with pytest.raises(UserError, match="no CUDA device"):
        resolved(["optim.batch_size=auto"])


def test_auto_is_the_largest_batch_of_the_device(monkeypatch, capsys):
    class Properties:
        total_memory = 2 * GIB

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # optimisers ask for a stream of one that is
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    rest = [word for word in SMALL if "batch" not in word]
    words = resolved([*rest, "optim.batch_size=auto", "method=full", "quant=none", "--once"])
    found = int(words[-1].removeprefix("optim.batch_size="))
    config = compose([*rest, "method=full", "quant=none"])
    assert needed(found, config) <= 2 * GIB < needed(found + 1, config) and words[-2] == "--once"
    assert f"optim.batch_size={found}" in capsys.readouterr().out


def test_processes_share_the_batch(s2a):
    one, four = (json.loads(s2a("method=full", "quant=none", f"processes={n}", "format=json")[1])[0] for n in (1, 4))
    assert four["peak_mib"] < one["peak_mib"] and four["static_mib"] == one["static_mib"]


def test_equal_neighbours_share_a_line():
    lines = [["a.0", "1"], ["a.1", "2"], ["a.2", "2"], ["a.3", "2"], ["b", "1"]]
    assert _merged(lines) == [["a.0", "1"], ["a.1 to a.3, each", "2"], ["b", "1"]]


def test_a_run_forecasts_its_memory(monkeypatch):
    block = {"peak_mib": 3000.0, "full_finetune_peak_mib": 9000.0}
    said, warning = outlook(block, torch.device("cpu"))
    assert "predicted peak 3,000 MiB" in said and "3.0x" in said and warning is None
    for gib, warned in ((8, False), (3, True)):
        properties = type("Properties", (), {"total_memory": gib * GIB})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        said, warning = outlook(block, torch.device("cuda", 0))
        assert bool(warning) == warned
        assert not warned or (f"fit={gib}.0GiB" in warning and "4,147 MiB" in warning)  # 3000 x 1.05 + 65 + 132 + 800


def test_a_snapshot_needs_cuda(tmp_path, capsys):
    from s2a_cli.memory import snapshot

    with snapshot(tmp_path, torch.device("cpu"), True):
        pass
    assert "needs CUDA" in capsys.readouterr().err and not list(tmp_path.iterdir())
