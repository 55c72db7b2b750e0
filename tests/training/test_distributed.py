"""One run in two processes gives what it gives in one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from PIL import Image

from s2a_cli.common import distributed
from s2a_cli.common.errors import UserError
from s2a_cli.training import checkpoints
from s2a_cli.training.prediction import predict
from s2a_cli.training.trained import load

pytestmark = pytest.mark.slow

WORDS = [
    *("dataset.val_fraction=0.05", "dataset.test_fraction=0.05"),  # 90 images each
    *("dataset=digits", "dataset.shots=8", "backbone=vit_micro", "method=s2a", "device=cpu", "workers=0"),
    *("optim.epochs=3", "optim.batch_size=27", "optim.name=sgd", "optim.lr=0.05", "optim.clip_grad=1"),
    *("backbone.kwargs.depth=2", "backbone.pretrained=false"),
]  # 80 images: a last batch of 26, whose halves are even, and batches whose halves are not


def start(folder, *words, processes=2):
    command = [sys.executable, "-m", "s2a_cli", "train", *WORDS, *words, f"run_dir={folder}"]
    if processes > 1:
        command[1:2] = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", "-m"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def outcome(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, safetensors.torch.load_file(folder / checkpoints.FILE)


def agree(one, two, without=()):
    for first, second in zip(one[0], two[0], strict=True):
        for key in first.keys() - {"seconds", *without}:
            assert first[key] == pytest.approx(second[key], rel=1e-4), key
    assert one[1].keys() == two[1].keys()
    for name, tensor in one[1].items():
        # sums in another order may move one number of a feature to the next of its codes of 8 bits
        torch.testing.assert_close(two[1][name], tensor, rtol=1e-3, atol=5e-5, msg=name)


def test_two_processes_train_what_one_does(tmp_path):
    words = ["quant=tiny", "quant.input=null"]  # recomputed from whole inputs: nothing is coded
    finish(start(tmp_path / "one", *words, processes=1))
    said = finish(start(tmp_path / "two", *words))
    assert said.count("top-1 %") == 1, "one table, of the first process"
    agree(outcome(tmp_path / "one"), outcome(tmp_path / "two"))
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["environment"]["processes"] == 2
    alone = json.loads((tmp_path / "one" / "result.json").read_text())
    assert result["id"] == alone["id"] and result["memory"]["kept_mib"] < alone["memory"]["kept_mib"]


def test_several_labels_an_image_in_two_processes_and_in_predictions(tmp_path):
    lines = ["path,labels"]
    for number in range(40):
        labels = [name for bit, name in enumerate(("dark", "warm", "wide")) if number >> bit & 1]
        size, red = (40 if "wide" in labels else 20, 20), 200 if "warm" in labels else 20
        image = Image.new("RGB", size, (red, 20 + 3 * number, 20))
        if "dark" in labels:
            image.paste((0, 0, 0), (0, 0, 20, 10))
        image.save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{';'.join(labels)}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    words = ["dataset=table", f"dataset.file={tmp_path / 'labels.csv'}", 'dataset.separator=";"', "dataset.shots=null"]
    words += ["quant=none", "optim.batch_size=10"]
    finish(start(tmp_path / "one", *words, processes=1))
    finish(start(tmp_path / "two", *words))
    # The rank of two images whose scores are equal but for rounding decides over percents of a mean precision.
    agree(outcome(tmp_path / "one"), outcome(tmp_path / "two"), without={"val_map"})
    alone, shared = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert alone["accuracy"]["test_map"] == pytest.approx(shared["accuracy"]["test_map"], abs=5)
    trained = load(tmp_path / "two")
    (found,) = predict(trained, [tmp_path / "5.png"], top=3)
    logits = trained(trained.transform(Image.open(tmp_path / "5.png"))[None])[0]
    expected = dict(zip(trained.classes, logits.sigmoid().tolist()))
    assert dict(found.classes) == pytest.approx(expected, abs=1e-5) and len(expected) == 3
    assert sum(expected.values()) != pytest.approx(1.0), "each label for itself"


def test_codes_are_those_of_the_first_process_and_a_broken_run_goes_on(tmp_path):
    words = ["quant=int4", "optim.epochs=4"]
    finish(start(tmp_path / "whole", *words))
    process = start(tmp_path / "broken", *words)
    while process.poll() is None and not (tmp_path / "broken" / checkpoints.STATE).exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    process.communicate(timeout=60)
    result = json.loads((tmp_path / "broken" / "result.json").read_text())
    assert result["status"] == "interrupted" or process.returncode == 0
    finish(start(tmp_path / "broken", *words))
    whole, broken = outcome(tmp_path / "whole"), outcome(tmp_path / "broken")
    agree(whole, broken)
    assert any(name.startswith(checkpoints.CALIBRATION) for name in broken[1])


def test_out_of_memory_in_one_process_is_that_of_the_run(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys, torch\n"
        "from s2a_cli.cli import main as cli\n"
        "from s2a_cli.training import loop as fitting\n"
        "train = fitting.TrainLoop._train\n"
        "def short(self, *args):\n"
        "    if os.environ['RANK'] == '1' and self.sofar.step == 1:\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')\n"
        "    return train(self, *args)\n"
        "fitting.TrainLoop._train = short\n"
        "sys.exit(cli.main(['train', *sys.argv[1:]]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    process = subprocess.Popen(
        [*command, *WORDS, "quant=none", f"run_dir={tmp_path / 'run'}"], stderr=subprocess.PIPE, text=True
    )
    _, err = process.communicate(timeout=120)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert process.returncode != 0 and result["status"] == "oom", err
    assert result["error"] == "process 1: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB"
    assert not (tmp_path / "run" / "traceback.txt").exists() and "gloo" not in result["error"]


@pytest.mark.parametrize(
    ("variable", "value"), [("WORLD_SIZE", "abc"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "-1"), ("WORLD_SIZE", "2")]
)
def test_an_environment_that_torchrun_does_not_make_is_named(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"{variable}={value}.*torchrun"), distributed.joined("cpu"):
        pass


def test_a_batch_that_is_too_small_to_share_is_refused(tmp_path):
    process = start(tmp_path, "optim.batch_size=1", "quant=none")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "a batch of 1 images can't be shared by 2 processes" in err
