"""Files of tensors from strangers: what is read, and what is refused in one line without taking its memory."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from s2a_cli import backbones
from s2a_cli.common import tensor_files
from s2a_cli.common.errors import UserError
from s2a_cli.config.schema import BackboneConfig
from s2a_cli.training import checkpoints

TINY = dict(img_size=32, patch_size=16, embed_dim=48, depth=1, num_heads=3)
SOURCE = timm.create_model("vit_tiny_patch16_224", num_classes=7, **TINY)
STATE = SOURCE.state_dict()
GIB = 2**30


def load(path) -> backbones.Backbone:
    return backbones.build(BackboneConfig("tiny", "vit_tiny_patch16_224", True, str(path), 32, kwargs=TINY), 5)


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(path: Path, content: object, compression: int = zipfile.ZIP_STORED) -> None:
    """A file as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("a/data.pkl", pickle.dumps(content, 2))
        file.writestr("a/version", "3\n")


def old(path: Path, content: object) -> None:
    """A file as torch before 1.6 wrote it."""
    parts = (
        torch.serialization.MAGIC_NUMBER,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {}},
        content,
        [],
    )
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))


@pytest.mark.parametrize(
    "content",
    [
        {"model": STATE, "epoch": torch.tensor(3)},
        {"state_dict": STATE, "best": np.float64(0.5), "step": np.int64(3), "flag": np.bool_(True)},
        {
            "state_dict": STATE,
            "args": argparse.Namespace(lr=1e-3, model="vit"),
            "optimizer": torch.optim.AdamW(SOURCE.parameters()).state_dict(),
        },
        {"model": {"state_dict": STATE}, "model_ema": None},
        {f"module.{name}": tensor for name, tensor in STATE.items()},
        dict(SOURCE.named_parameters()),
    ],
    ids=["epoch", "scalars", "args", "twice", "module", "parameters"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_scripts_save_beside_the_weights_is_left_aside(tmp_path, content, zipped):
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    made = load(tmp_path / "w.pth").model.state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in STATE.items() if not name.startswith("head."))


def contains_itself():
    first, second = {}, {}
    first["model"], second["state_dict"] = second, first
    return first


ODD = {
    "itself": (contains_itself, "contains itself"),
    "numbers for names": (lambda: {**STATE, 1: torch.zeros(2)}, r"no names: one is called 1 \(int\)"),
    "sparse": (
        lambda: {**STATE, "cls_token": STATE["cls_token"].to_sparse()},
        "holds torch._utils._rebuild_sparse_tensor",
    ),
    "meta": (lambda: {**STATE, "cls_token": STATE["cls_token"].to("meta")}, "holds torch._utils._rebuild_meta_tensor"),
    "complex": (
        lambda: {**STATE, "cls_token": STATE["cls_token"].to(torch.complex64)},
        "cls_token is of complex numbers",
    ),
    "expanded": (
        lambda: {**STATE, "pos_embed": torch.zeros(1).expand(1, 10**9, 48)},
        "pos_embed .* is larger than the file",
    ),
    "a list": (lambda: [STATE], "holds a list, not a dictionary"),
    "a list of weights": (lambda: {"model": [1, 2]}, "missing: cls_token"),
    "nothing": (dict, "missing: cls_token"),
    "code": (lambda: {"model": STATE, "f": print}, "holds __builtin__.print"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ODD)
def test_content_that_is_no_state_dict_is_named_in_one_line(tmp_path, kind, zipped):
    content, said = ODD[kind]
    torch.save(content(), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=said) as raised:
        load(tmp_path / "w.pth")
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)


def test_names_in_a_file_do_not_reach_the_terminal_as_they_are(tmp_path):
    torch.save({**STATE, "\x1b[2Jodd\nkey\0": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"1 unexpected: \\x1b\[2Jodd\\nkey\\x00$") as raised:
        load(tmp_path / "w.pth")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("write", [archive, old])
@pytest.mark.parametrize(
    "function", [bytearray, torch.FloatTensor, os.system], ids=["bytearray", "FloatTensor", "system"]
)
def test_a_small_file_gets_no_large_memory_and_no_call(tmp_path, write, function):
    write(tmp_path / "w.pth", {"a": Calls(function, 64 * GIB)})
    assert (tmp_path / "w.pth").stat().st_size < 2000
    with pytest.raises(UserError, match=r"only plain tensors, numbers and texts are read"):
        load(tmp_path / "w.pth")


def test_archives_that_expand_are_refused_by_what_they_declare(tmp_path):
    archive(tmp_path / "w.pth", {"a": "x" * 10**6}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed, which torch.save does not do"):
        load(tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("cls.npy", "w") as array,
    ):
        np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": (30 * 2**20,)})
        for _ in range(120):
            array.write(bytes(2**20))
    assert (tmp_path / "w.npz").stat().st_size < 2**20
    with pytest.raises(UserError, match="arrays expand to 120 MiB; the model's could be 65 MiB"):
        load(tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as file, file.open("cls.npy", "w") as array:
        np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": (64 * GIB,)})
    with pytest.raises(UserError, match="cls.npy declares 262,144 MiB and has less"):
        load(tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda file: np.save(file, np.zeros(3)), "no archive of arrays"),
        (lambda file: np.savez(file, a=np.array([print], dtype=object)), "holds Python objects"),
        (lambda file: np.savez(file, a=np.zeros(3)), "can't be loaded into VisionTransformer"),
        (lambda file: None, "no archive of arrays"),
    ],
    ids=["npy", "objects", "others", "empty"],
)
def test_arrays_that_are_no_weights(tmp_path, content, said):
    buffer = io.BytesIO()
    content(buffer)
    (tmp_path / "w.npz").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=said) as raised:
        load(tmp_path / "w.npz")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 3000, "a\0b", "pipe.pth", "zero.pth", "folder.pth"])
def test_what_is_no_file_is_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / name)


def test_tensors_of_another_shape_are_not_read(tmp_path, monkeypatch):
    model = torch.nn.Linear(3, 2)
    checkpoints.save(tmp_path, checkpoints.trainable_state(model), {}, "w")
    checkpoints.load(tmp_path, model, "w")
    with pytest.raises(UserError, match="are not those of this backbone and method .first difference: weight"):
        checkpoints.load(tmp_path, torch.nn.Linear(4, 2), "w")
    (tmp_path / checkpoints.FILE).unlink()
    os.mkfifo(tmp_path / checkpoints.FILE)
    with pytest.raises(UserError, match="no such file"):
        checkpoints.load(tmp_path, model, "w")


def test_a_state_that_lacks_something_or_calls_something_is_damaged(tmp_path):
    torch.save({"content": ""}, tmp_path / checkpoints.STATE)
    with pytest.raises(UserError, match=r"state.pt: damaged \(lacks accuracy\); remove it"):
        checkpoints.load_state(tmp_path)
    archive(tmp_path / checkpoints.STATE, {"content": Calls(bytearray, 64 * GIB)})
    with pytest.raises(UserError, match="state.pt: damaged .*bytearray"):
        checkpoints.load_state(tmp_path)
    (tmp_path / checkpoints.STATE).unlink()
    os.mkfifo(tmp_path / checkpoints.STATE)
    with pytest.raises(UserError, match="state.pt: no regular file"):
        checkpoints.load_state(tmp_path)
    assert checkpoints.load_state(tmp_path / "nowhere") is None


def test_all_scalars_of_numpy_come_back(tmp_path):
    scalars = [np.float32(1.5), np.float64(2), np.int32(3), np.uint8(4), np.bool_(True)]
    torch.save(scalars, tmp_path / "s.pt")
    assert tensor_files.read(tmp_path / "s.pt") == scalars
