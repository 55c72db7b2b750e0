"""Reads files of tensors that somebody else may have made, and checks what they declare before it takes memory for it.

No code in them is run, none makes a process wait, and none takes more memory than a few times its own size.
"""

from __future__ import annotations

import argparse
import math
import os
import pickletools
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from s2a_cli.common.text import first_line, printable

INDEX = 16 * 2**20  # bytes of the pickle that names the tensors; for a model of a thousand layers it takes 1 MiB
LEGACY = 5  # pickles at the beginning of a file of torch before 1.6: magic, version, sizes, content, storages
# What a pickle may call: what makes plain tensors, numbers and texts, and nothing that makes them large.
NAMES = re.compile(
    r"torch\.\w*Storage|torch\.storage\.\w*Storage|torch\.[a-z][a-z0-9_]*|torch\.(Size|Tensor|nn\.parameter\.Parameter)"
    r"|torch\._utils\._rebuild_(tensor(_v[23])?|parameter(_with_state)?)|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.serialization\._get_layout|collections\.(OrderedDict|Counter)|builtins\.(set|complex)|__builtin__\.(set|complex)"
    r"|_codecs\.encode|numpy\.dtype|numpy\.dtypes\.\w+|numpy\.(core|_core)\.multiarray\.scalar|argparse\.Namespace"
)
SCALARS: list[Any] = [np.dtype, argparse.Namespace, *(getattr(np.dtypes, name) for name in np.dtypes.__all__)]
SCALARS += [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


class Unreadable(Exception):
    """Says in one line what is wrong with a file."""

    def __init__(self, text: str):
        super().__init__(printable(text, 300))


def is_file(path: Path) -> bool:
    """Tells whether a path is a regular file: a pipe or a device could be read for ever.

    Returns False for a name that no file can have.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def read(path: Path) -> Any:
    """Returns the content of a .safetensors file, or of one that torch.save has written. Raises Unreadable.

    Of the latter only functions that make plain tensors, numbers and texts are called.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _check_pickled(path)
        with torch.serialization.safe_globals(SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Unreadable:
        raise
    except Exception as error:  # safetensors, zipfile, pickle and torch raise kinds of their own for a damaged file
        raise Unreadable(f"damaged or of another format ({first_line(error)})") from None


def _check_pickled(path: Path) -> None:
    """Raises Unreadable for a file of torch.save that is compressed, declares too much or calls too much."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            for _ in range(LEGACY):
                _check_names(file)
            return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise Unreadable("compressed, which torch.save does not do")
        if sum(member.file_size for member in members) > size:
            raise Unreadable("declares more than it holds")
        for member in members:
            if member.filename.endswith(".pkl"):
                with archive.open(member) as file:
                    _check_names(file)


def _check_names(file: IO[bytes]) -> None:
    """Raises Unreadable for a pickle that is too long, or calls something beside NAMES."""
    for opcode, argument, place in pickletools.genops(file):
        if place is not None and place > INDEX:
            raise Unreadable(f"its list of tensors has more than {INDEX // 2**20} MiB")
        if opcode.name == "GLOBAL" and not NAMES.fullmatch(name := str(argument).replace(" ", ".")):
            raise Unreadable(f"holds {name[:100]}; only plain tensors, numbers and texts are read")
        if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise Unreadable("written with a pickle protocol that torch.save does not use by default")


def tensors(content: Any, wrappers: tuple[str, ...], most: int) -> dict[str, Tensor]:
    """Returns the state dict in a file's content: the content itself, or what lies under `wrappers`, however deep.

    most: bytes that a tensor may have. Raises Unreadable where there is none, and for tensors that are not plain.
    """
    seen: list[int] = []
    while isinstance(content, dict):
        if id(content) in seen:
            raise Unreadable("holds a dictionary that contains itself")
        seen.append(id(content))
        inner = next((content[key] for key in wrappers if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict):
        raise Unreadable(f"holds a {type(content).__name__}, not a dictionary of tensors")
    found = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            continue
        if not isinstance(name, str):
            raise Unreadable(f"its tensors have no names: one is called {str(name)[:100]} ({type(name).__name__})")
        if odd := _oddity(value):
            raise Unreadable(f"{name[:100]} is {odd}; expected a plain tensor")
        if value.numel() * value.element_size() > most:
            raise Unreadable(f"{name[:100]} {tuple(value.shape)} is larger than the file")
        found[name] = Tensor.detach(value)  # without attributes that the file may have set
    return found


def _oddity(value: Tensor) -> str:
    """Returns what makes a tensor no plain one, or an empty string."""
    if value.is_nested:
        return "nested"
    if value.layout is not torch.strided:
        return "sparse"
    if value.device.type != "cpu":
        return f"on the device {value.device.type}"
    return "quantized" if value.is_quantized else "of complex numbers" if value.is_complex() else ""


def check_arrays(path: Path, most: int) -> list[str]:
    """Returns the names of the arrays of a .npz, without reading any array.

    Raises Unreadable where they declare more than `most` bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if (declared := sum(member.file_size for member in members)) > most:
                raise Unreadable(
                    f"its arrays expand to {declared / 2**20:,.0f} MiB; the model's could be {most / 2**20:,.0f} MiB"
                )
            for member in members:
                with archive.open(member) as file:
                    if (need := _array_bytes(file)) > member.file_size:
                        raise Unreadable(f"{member.filename[:100]} declares {need / 2**20:,.0f} MiB and has less")
            return [member.filename.removesuffix(".npy") for member in members]
    except Unreadable:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise kinds of their own
        raise Unreadable(f"no archive of arrays, or damaged ({first_line(error)})") from None


def _array_bytes(file: IO[bytes]) -> int:
    """Returns the bytes that the header of a .npy file declares. Raises Unreadable for Python objects."""
    version = np.lib.format.read_magic(file)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = headers[version](file)
    if dtype.hasobject:
        raise Unreadable("holds Python objects, not arrays of numbers")
    return math.prod(shape) * dtype.itemsize


def shapes(file: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields (name, shape) of the tensors in an open .safetensors file, without reading any tensor."""
    for name in file.keys():  # noqa: SIM118 (a safe_open is no mapping)
        yield name, tuple(file.get_slice(name).get_shape())
