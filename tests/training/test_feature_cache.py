"""dataset.cache=features: a run on kept taps is the run without them, and the files are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys

import pytest
import torch
from again import figures_again
from PIL import Image

from s2a_cli import data
from s2a_cli.common.errors import RunError, UserError
from s2a_cli.config.compose import compose, recompose
from s2a_cli.config.settings import plain
from s2a_cli.methods.parts.feature_head import Features
from s2a_cli.results import record
from s2a_cli.training import checkpoints, feature_cache, forecast, loop, trainer
from s2a_cli.training import run as run_module
from s2a_cli.training.feature_cache import Kept

QUICK = [
    *("dataset.val_fraction=0.05", "dataset.test_fraction=0.05"),  # 90 images each
    *("dataset=digits", "dataset.shots=8", "backbone=vit_micro", "method=side", "device=cpu", "workers=0"),
    *("optim.epochs=2", "optim.batch_size=16", "dataset.scale=null"),
]
CACHE = "dataset.cache=features"
SHALLOW = ["backbone.kwargs.depth=3", "backbone.pretrained=false"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("S2A_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(forecast, "predict", lambda run: None)
    return tmp_path / "data" / "taps"


@pytest.fixture
def filled(monkeypatch):
    """The names of the files that were filled."""
    write, names = Kept.write, []
    monkeypatch.setattr(Kept, "write", lambda self, batches: (names.append(self.path.name), write(self, batches))[1])
    return names


def train(folder, *words):
    backbone = [] if any(word.startswith("backbone") for word in words) else SHALLOW
    return trainer.train(compose([*QUICK, *backbone, f"run_dir={folder}", *words]))[0]


def outcome(folder):
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in metrics]
    tensors = checkpoints.safetensors.torch.load_file(folder / checkpoints.FILE)
    return lines, record.read_result(folder)["accuracy"], tensors


def agree(one, two):
    for first, second in zip(one[0], two[0], strict=True):
        assert first == pytest.approx(second, rel=1e-5)
    assert one[1] == two[1]

    def shapes(tensors):
        """By what a layer is called in the model: in the trained part alone it has another name."""
        names = {name: name.replace("calibration.branch", "calibration.s2a.side") for name in tensors}
        return {names[n].replace("calibration.model.", "calibration."): t.shape for n, t in tensors.items()}

    assert shapes(one[2]) == shapes(two[2])
    for name, tensor in one[2].items():
        if not name.startswith(checkpoints.CALIBRATION):
            torch.testing.assert_close(two[2][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "words",
    [
        ["dataset.hflip=0"],
        ["dataset.hflip=0.5"],
        ["method=linear", "dataset.hflip=0.5", "quant=none"],
        ["dataset.hflip=0.5", "method.blocks=last:2", "precision=amp-bf16", "optim.micro_batch=6", "optim.clip_grad=1"],
        ["dataset.hflip=1", "precision=bf16", "quant=tiny", "backbone.weights=int8"],
        ["backbone=resnet18", "backbone.pretrained=false", "backbone.image_size=32", "dataset.hflip=0.5"],
        ["method=s2a", "method.blocks=last:2", "dataset.hflip=0.5", "quant=tiny", "optim.micro_batch=6"],
        ["method=bias", "method.blocks=last:1", "quant=exact", "quant.recompute=block", "precision=amp-bf16"],
    ],
    ids=["still", "flips", "linear", "amp", "bf16", "resnet", "s2a, last blocks", "bias, last block"],
)
def test_a_run_on_kept_taps_is_the_run_without(tmp_path, words):
    train(tmp_path / "without", *words)
    train(tmp_path / "with", *words, CACHE)
    agree(outcome(tmp_path / "with"), outcome(tmp_path / "without"))
    result = record.read_result(tmp_path / "with")
    for cached in (CACHE, "dataset.cache=null"):  # the saved tensors are those of the whole model
        scores = figures_again(recompose(result["config"], [cached]), tmp_path / "with")
        assert scores["top1"] == result["accuracy"]["test_top1"]


def test_an_image_is_mirrored_when_its_transform_would_mirror_it():
    image = Image.new("RGB", (2, 2))
    image.putpixel((0, 0), (255, 0, 0)), image.putpixel((0, 1), (255, 0, 0))
    look = data.ImageConfig(2, (0.0,) * 3, (1.0,) * 3, "nearest", 1.0)
    for probability in (0.0, 0.3, 0.5, 1.0):
        config = compose([*QUICK, f"dataset.hflip={probability}"]).dataset
        transform, seen = data.build_transform(look, config, train=True), []
        for index in range(60):
            torch.manual_seed(data.mix(3, 7, index))
            seen.append(transform(image)[0, 0, 1].item() == 1)
        assert seen == [feature_cache.mirrors(3, (7, index), probability) for index in range(60)]
        assert any(seen) == (probability > 0)


def test_runs_share_what_is_the_same_for_them(tmp_path, own_folder, filled, capsys):
    train(tmp_path / "1", CACHE, "backbone.pretrained=true")
    assert len(filled) == 3 and {path.name for path in own_folder.glob("*.taps")} == set(filled)
    train(
        tmp_path / "2",
        CACHE,
        "backbone.pretrained=true",
        "seed=1",
        "method.width=3",
        "optim.batch_size=9",
        "method.lr=0.1",
    )
    assert len(filled) == 3 and "there already" in capsys.readouterr().out
    train(
        tmp_path / "3", CACHE, "backbone.pretrained=true", "dataset.hflip=0.5"
    )  # validation and test images stay as they are
    assert len(filled) == 4 and filled[-1].startswith("train-")


def test_runs_that_read_something_else_have_other_files(tmp_path):
    def names(*words):
        fields = [((4,), torch.float32)]  # of the same shape everywhere: what the names depend on beside it
        return {
            kept.path.name
            for kept in feature_cache._files(
                run_module.prepare(compose([*QUICK, CACHE, *words])), tmp_path, fields
            ).values()
        }

    own = names()
    assert own == names("seed=1", "method.heads=2", "method.lr=0.1", "optim.epochs=3", "quant=none") and len(own) == 3
    tail = ("method=s2a", "method.blocks=last:1")
    assert names(*tail) == names(*tail, "method.side.heads=2", "method.prompt=null", "quant=none")
    assert not names(*tail) & (own | names("method=s2a", "method.blocks=last:2") | names(*tail, "method.side.grid=2"))
    assert not names(*tail) & names("method=bias", "method.blocks=last:1"), "it keeps nothing of other blocks"
    others = ["method.grid=2", "method.blocks=last:1", "method=linear", "dataset.split_seed=1", "dataset.shots=7"]
    others += [
        "backbone.crop_pct=0.8",
        "precision=amp-bf16",
        "backbone.weights=int8",
        "backbone.pretrained=false",
        "backbone.mean=[0,0,0]",
    ]
    for word in others:
        assert not own & names(word), word


def rows_turned(content):
    """Every byte of the file is there, and those of its rows stand for other images."""
    half = feature_cache.HEADER + (len(content) - feature_cache.HEADER - 32) // 2
    return content[: feature_cache.HEADER] + content[half:-32] + content[feature_cache.HEADER : half] + content[-32:]


@pytest.mark.parametrize(
    ("damage", "split"),
    [
        (lambda b: b[:-1], "train"),
        (lambda b: b"x" + b[1:], "val"),
        (lambda b: b"", "train"),
        (rows_turned, "train"),
        (rows_turned, "test"),
    ],
    ids=["cut", "header", "empty", "turned", "turned test"],
)
def test_a_damaged_file_is_filled_anew(tmp_path, own_folder, filled, damage, split):
    train(tmp_path / "1", CACHE)
    path = next(own_folder.glob(f"{split}-*.taps"))
    good = path.read_bytes()
    path.write_bytes(damage(good))
    train(tmp_path / "2", CACHE)
    assert len(filled) == 4 and path.read_bytes() == good
    assert outcome(tmp_path / "1")[:2] == outcome(tmp_path / "2")[:2]


def test_a_file_is_private_and_none_of_another_user_or_kind_is_read(tmp_path, own_folder, monkeypatch):
    train(tmp_path / "1", CACHE)
    path = next(own_folder.glob("train-*.taps"))
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in own_folder.glob("*.taps"))
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "_me", lambda folder: path.stat().st_uid + 1)
        with pytest.raises(UserError, match="train-.*.taps belongs to another user: it could hold anything; remove it"):
            train(tmp_path / "2", CACHE)
    good = path.rename(tmp_path / "moved")
    path.symlink_to(good)
    with pytest.raises(UserError, match="is no regular file"):
        train(tmp_path / "3", CACHE)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is no regular file"):
        train(tmp_path / "4", CACHE)


def test_the_file_that_was_checked_is_the_one_that_is_read(tmp_path):
    fields = [((3,), torch.float32)]
    kept, other = (Kept(tmp_path, {"split": "train"}, 2, False, fields) for _ in range(2))
    kept.write(iter([[Features([torch.ones(2, 3)])]]))
    assert kept.whole()
    other.write(iter([[Features([torch.zeros(2, 3)])]]))  # in its place
    assert kept.batch([0]).tensors[0].sum() == 3 and other.batch([0]).tensors[0].sum() == 0
    other.discard()
    with pytest.raises(RunError, match="was changed or removed"):
        other.batch([0])


def test_a_file_of_other_values_is_filled_anew(tmp_path, own_folder, filled):
    train(tmp_path / "1", CACHE)
    path = next(own_folder.glob("train-*.taps"))
    good = path.read_bytes()
    content = good[: feature_cache.HEADER] + bytes(len(good) - feature_cache.HEADER - 32)
    path.write_bytes(content)
    with open(path, "r+b") as file:  # with a checksum that is right: of another model, or made by hand
        checksum = feature_cache._checksum(file, len(content))
        file.seek(0, 2)
        file.write(checksum)
    train(tmp_path / "2", CACHE)
    assert len(filled) == 6 and path.read_bytes() == good


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), signal.SIGTERM], ids=str
)
def test_a_filling_that_breaks_off_leaves_nothing(tmp_path, own_folder, monkeypatch, error):
    def breaks(*args):
        if error is signal.SIGTERM:
            return signal.raise_signal(error)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache.Progress, "add", breaks)
        if isinstance(error, OSError):
            with pytest.raises(RunError, match="dataset.cache=features: .*No space left.*make room"):
                train(tmp_path / "run", CACHE)
        else:
            assert train(tmp_path / "run", CACHE)["status"] == "interrupted"
    assert [path.suffix for path in own_folder.iterdir()] == [".lock"]
    litter = own_folder / next(own_folder.iterdir()).name.replace(".lock", ".abcdefgh")
    litter.write_bytes(b"half, of a process that was killed")
    assert train(tmp_path / "run", CACHE)["status"] == "ok" and not litter.exists()


def test_a_disk_without_the_room_is_refused_before_anything_is_written(tmp_path, own_folder, monkeypatch):
    monkeypatch.setattr(
        feature_cache.shutil, "disk_usage", lambda path: feature_cache.shutil._ntuple_diskusage(1, 1, 0)
    )
    with pytest.raises(RunError, match=r"needs \d+ MiB in .*taps, where 0 MiB are free"):
        train(tmp_path / "run", CACHE)
    assert not own_folder.exists()


def test_a_broken_run_goes_on(tmp_path, monkeypatch):
    train(tmp_path / "whole", CACHE, "dataset.hflip=0.5")
    one, count = loop.TrainLoop._train, [0]

    def breaks(self, *args):
        count[0] += 1
        if count[0] == 8:
            raise KeyboardInterrupt
        return one(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainLoop, "_train", breaks)
        assert train(tmp_path / "broken", CACHE, "dataset.hflip=0.5", "save_steps=1")["status"] == "interrupted"
    train(tmp_path / "broken", CACHE, "dataset.hflip=0.5", "save_steps=1")
    assert (tmp_path / "broken" / checkpoints.FILE).read_bytes() == (tmp_path / "whole" / checkpoints.FILE).read_bytes()
    assert outcome(tmp_path / "broken")[:2] == outcome(tmp_path / "whole")[:2]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["dataset.scale=[0.8,1]"],
            "dataset.cache=features needs dataset.scale=null: each random crop would need another forward pass",
        ),
        (["optim.mixup=0.2"], "needs optim.mixup=0.0: each mixed image"),
        (["optim.cutmix=1.0"], "needs optim.cutmix=0.0: each mixed image"),
        (["compile=true", "quant=none"], "needs compile=false"),
        (["dataset.cache=tap"], "expected one of features, auto, or null"),
        (
            ["method=bias"],
            "method=bias changes or reads the backbone from its first block on.* linear, side, and .*last:4",
        ),
        (["method=s2a"], "method=s2a changes"),
        (["method=partial", "backbone=resnet18", "backbone.pretrained=false"], "method=partial trains BatchNorms, so"),
        (
            ["backbone=swin_t", "backbone.pretrained=false", "backbone.kwargs.drop_path_rate=0.5"],
            "another in training than in evaluation",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_refused_in_one_line(words, message):
    with pytest.raises(UserError, match=message) as caught:
        run_module.prepare(compose([*QUICK, CACHE, *words]))
    assert "\n" not in str(caught.value)


def test_without_a_cache_a_run_has_the_identity_that_it_always_had():
    config = trainer.OmegaConf.to_container(compose(QUICK))
    before = {**config, "dataset": {key: value for key, value in config["dataset"].items() if key != "cache"}}
    kept = {**config, "dataset": config["dataset"] | {"cache": "features"}}
    assert record.content(before, "r", "w") == record.content(config, "r", "w") != record.content(kept, "r", "w")


def test_the_predicted_peak_is_that_of_filling_or_of_the_step():
    def peak(*words):
        config = compose([*QUICK, *words])
        return forecast.profile_composition(config, 10, 1000).memory.peak_mib

    assert peak(CACHE) < peak()
    assert peak(CACHE) == peak(CACHE, "optim.batch_size=20"), "that of filling, with few images at a time"
    large = peak(CACHE, "optim.batch_size=1000")
    assert peak(CACHE, "optim.micro_batch=4") < peak(CACHE) < large < peak("optim.batch_size=1000")


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(trainer.distributed, "rank_and_world_size", lambda: (0, 2))
    with pytest.raises(UserError, match="trains in one process"):
        run_module.prepare(compose([*QUICK, CACHE]))


def test_taps_keep_their_dtypes():
    taps = Features([torch.zeros(5, 3), torch.zeros(5, 2, 4, dtype=torch.float16)])
    assert [t.dtype for t in taps.to(torch.device("cpu")).tensors] == [torch.float32, torch.float16]
    assert [len(part) for part in taps.split(2)] == [2, 2, 1] and len(taps) == 5


def test_a_file_gives_back_what_was_written(tmp_path):
    fields = [((5,), torch.float32), ((3, 2), torch.float16), ((1,), torch.bfloat16)]
    kept = Kept(tmp_path, {"split": "train", "long": "x" * 5000}, 7, True, fields)
    assert not kept.whole()
    views = [Features(torch.randn(7, *shape).to(dtype) for shape, dtype in fields) for _ in range(2)]
    kept.write(
        iter([[Features(t[:4] for t in v.tensors) for v in views], [Features(t[4:] for t in v.tensors) for v in views]])
    )
    assert kept.whole() and kept.path.stat().st_size == kept.bytes
    for index in (6, 0, 3):
        for mirror, view in enumerate(views):
            for read, wrote in zip(kept.batch([2 * index + mirror]).tensors, view.tensors, strict=True):
                assert torch.equal(read[0], wrote[index]) and read.dtype == wrote.dtype
    assert not Kept(tmp_path, {"split": "train", "long": "y"}, 7, True, fields).whole()


@pytest.mark.slow
def test_runs_that_start_together_fill_once(tmp_path, own_folder):
    words = [*QUICK, CACHE, "optim.epochs=1"]
    command = [sys.executable, "-m", "s2a_cli", "train", *words]
    runs = [
        subprocess.Popen([*command, f"seed={n}", f"run_dir={tmp_path / str(n)}"], stderr=subprocess.PIPE)
        for n in range(2)
    ]
    for process in runs:
        assert process.wait(timeout=120) == 0, process.stderr.read()
    assert len(list(own_folder.glob("*.taps"))) == 3 and not list(own_folder.glob(".*.????????"))


def test_the_setting_by_its_name_of_version_0_1_0_is_the_same_run(tmp_path):
    words = ["method=side", "dataset.scale=null"]
    older, now = (compose([*words, f"dataset.cache={name}"]) for name in ("taps", "features"))
    assert older == now and older.dataset.cache == "features"
    config = plain(older, resolve=True)
    content = record.content(config, "data", "weights")
    assert content == record.content(config | {"dataset": config["dataset"] | {"cache": "taps"}}, "data", "weights")
    assert '"cache": "taps"' in content  # so that a run has the id that it had
