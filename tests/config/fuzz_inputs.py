"""Inputs of the fuzzers of command lines and of checkpoint files, and what must hold for each.

A long run calls the same: `check_words` with what `command_lines()` gives, `check_file` with what `files()` gives.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from hypothesis import strategies as st

from s2a_cli.cli.main import main
from s2a_cli.common import tensor_files
from s2a_cli.config.compose import groups
from s2a_cli.config.schema import RunConfig
from s2a_cli.config.settings import walk

CODES = {0, 1, 2, 130}  # 1: a run failed
WRAPPERS = ("state_dict", "model")
GROUPS = groups()
KEYS = [
    *(key for key, _, _ in walk(RunConfig)),
    *(f"method.{name}" for name in ("lr", "blocks", "rank", "heads", "width", "grid", "lr_scale", "segments")),
    *GROUPS,
    "backbone.kwargs",
    "backbone.kwargs.depth",
    "backbone.pretrained",
    "dataset.root",
    "quant.blocks",
    "method",
    "test",
]
KEYS = [key for key in KEYS if key != "experiment"]
ODD = [
    *(
        "",
        "null",
        "true",
        "-0",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1e-320",
        "9" * 30,
        "9" * 400,
        "9" * 5000,
        "1_0",
        "0x10",
        "1e9",
    ),
    *(
        "${seed}",
        "${method}",
        "${.lr}",
        "${nope}",
        "${oc.env:HOME}",
        "${oc.env:NOPE}",
        "${times:1,2}",
        "${" * 30,
        "${oc.decode:'${seed}'}",
        "???",
    ),
    *(
        "[]",
        "{}",
        "[[[]]]",
        "[" * 300 + "]" * 300,
        "{a:1}",
        "{3:{norm:8}}",
        "[1,2,3]",
        "[a,null]",
        "'",
        '"',
        "\\",
        "a b",
        "a\nb",
        "\x1b[2J",
        "\0",
    ),
    *(
        "range(0,3)",
        "range(0,3,0)",
        "range(nan,3)",
        "range(0,1e18)",
        "interval(0,1)",
        "glob(*)",
        "choice()",
        "choice(1,2)",
        "shuffle(1,2)",
    ),
    *(
        "../../x",
        "/etc/passwd",
        "~",
        "~nobody/x",
        "cuda:99",
        "cuda:" + "9" * 20,
        "last:3",
        "last:" + "9" * 30,
        "é",
        "日本",
        "\udcff",
        "x" * 300,
        "x" * 6000,
    ),
]


def values() -> st.SearchStrategy[str]:
    """Draws values of settings: right ones, odd ones, and any text."""
    options = [option for found in GROUPS.values() for option in found]
    numbers = st.integers().map(str) | st.floats().map(str)
    return (
        st.sampled_from(ODD)
        | st.sampled_from(options)
        | numbers
        | st.text(max_size=30)
        | st.text("[]{}(),:=$.'\"\\_19ae ", max_size=20)
    )


def words() -> st.SearchStrategy[str]:
    """Draws words of a command line, most of them key=value with a key that there is."""
    keys = st.sampled_from(KEYS) | st.text("abcd._+~@:/=", max_size=12)
    pairs = st.builds("{}{}={}".format, st.sampled_from(["", "", "", "+", "++", "~"]), keys, values())
    return pairs | values()


def command_lines() -> st.SearchStrategy[list[str]]:
    return st.builds(
        lambda command, rest: [command, *rest], st.sampled_from(["validate", "sweep"]), st.lists(words(), max_size=5)
    )


def check_words(line: list[str]) -> None:
    """Runs a line that trains nothing, in a folder of its own.

    Fails for a traceback, an unknown exit code, many lines, or a file elsewhere.
    """
    line = [word for word in line if not word.startswith("-")]
    if line[0] == "sweep":  # what is in it is looked at, and nothing is started
        line = ["sweep", *line[1:], "--cfg", "job"]
    said, told = io.StringIO(), io.StringIO()
    before = sorted(os.listdir("."))
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(told):
        code = main(list(line))
    assert code in CODES - {1, 130}, (code, said.getvalue()[:500])
    assert (code == 0) == bool(told.getvalue()) and "Traceback" not in said.getvalue()
    lines = said.getvalue().splitlines()
    assert code == 0 or (lines and lines[0].startswith("s2a: "))
    assert sorted(os.listdir(".")) == before


def contents() -> st.SearchStrategy[object]:
    """Draws what a script could have saved, and what none has."""
    tensors = st.sampled_from(
        [
            torch.zeros(2),
            torch.zeros(0),
            torch.tensor(1),
            torch.zeros(2, dtype=torch.int8),
            torch.zeros(2, dtype=torch.complex64),
            torch.zeros(2, device="meta"),
            torch.eye(2).to_sparse(),
            torch.zeros(1).expand(10**9),
            torch.zeros(2, dtype=torch.bfloat16),
        ]
    )
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8)
    leaves = (
        tensors | plain | st.sampled_from([np.float64(1), np.zeros(2), print, bytearray(3), {1, 2}, torch.Size([2])])
    )
    names = st.sampled_from(["state_dict", "model", "a.weight", "module.b", ""]) | st.integers(0, 3) | st.none()
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=8
    )


def damages() -> st.SearchStrategy[object]:
    """Draws changes of a file's bytes: none, cut off, others in their place, some more."""
    flips = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4)

    def damage(flips: list[tuple[int, int]], cut: float, more: bytes):
        def change(content: bytes) -> bytes:
            changed = bytearray(content)
            for place, value in flips if changed else ():
                changed[place % len(changed)] = value
            return bytes(changed[: int(cut * len(changed))]) + more

        return change

    return st.builds(damage, flips, st.just(1.0) | st.floats(0, 1), st.just(b"") | st.binary(max_size=40))


def as_zip(content: object) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", pickle.dumps(content, 4))
    return buffer.getvalue()


def saved(content: object, legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def arrays(content: object) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, cls=np.zeros(3), odd=np.array([1.0, None][: 1 + (content is None)]))
    return buffer.getvalue()


def safe(content: object) -> bytes:
    plain = {
        k: v.contiguous()
        for k, v in (content if isinstance(content, dict) else {}).items()
        if isinstance(k, str) and _plain(v)
    }
    return safetensors.torch.save(plain)


def _plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not tensor_files._oddity(value) and value.numel() < 100


FORMATS = {
    "zip.pth": lambda content: saved(content, False),
    "old.pth": lambda content: saved(content, True),
    "pickle.pth": lambda content: pickle.dumps(content, 2),
    "deflated.pth": as_zip,
    "w.npz": arrays,
    "w.safetensors": safe,
}


def files() -> st.SearchStrategy[tuple[str, bytes]]:
    """Draws (name, bytes) of checkpoint files, whole and damaged, and of files that are none."""

    def make(name: str, content: object, change) -> tuple[str, bytes]:
        return name, change(FORMATS[name](content))

    made = st.builds(make, st.sampled_from(sorted(FORMATS)), contents(), damages())
    return made | st.tuples(st.sampled_from(sorted(FORMATS)), st.binary(max_size=200))


def check_file(folder: Path, name: str, content: bytes) -> bool:
    """Reads such a file, which gives plain tensors or one line. Returns whether it was read."""
    path = Path(folder) / name
    path.write_bytes(content)
    try:
        if path.suffix == ".npz":
            tensor_files.check_arrays(path, 10**6)
            return True
        found = tensor_files.tensors(tensor_files.read(path), WRAPPERS, len(content))
    except tensor_files.Unreadable as error:
        assert "\n" not in str(error) and len(str(error)) < 400 and str(error).isprintable()
        return False
    assert all(
        isinstance(key, str) and type(tensor) is torch.Tensor and tensor.device.type == "cpu"
        for key, tensor in found.items()
    )
    return True
