"""What each Triton kernel takes on each GPU: registers, spills, shared memory, instructions an element. Needs no GPU.

    python benchmarks/kernels/resources.py [arch=sm_80,gfx942] [dtype=bf16] [backbone=vit_b] [out=benchmarks/kernels]

Real training steps of the presets run on tensors without data, and the calls of operators that have a kernel are noted.
The launchers are then called with the same arguments on meta tensors, and what they would launch is compiled for each
architecture. So the list of kernels and of what they are specialised for is the launchers' own. Writes resources.json
and resources.md. Instructions are counted in the machine code (SASS, or AMD's), those that run once a program included;
divided by the elements that a thread has in one pass. They are counts, not measurements of speed.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import jit

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tiers"))
from rows import Made, Row

from s2a_cli import memory
from s2a_cli.activations import kernels
from s2a_cli.activations.kernels import launch, pooling
from s2a_cli.activations.ops import pointwise
from s2a_cli.common.errors import UserError

TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BACKBONES = ("vit_b", "swin_b", "swin_t", "convnext_b", "resnet50")
QUANTS = ("int4", "paper", "tiny")
ALL_QUANTS = ("int1", "int2", "int5", "int8", "exact")  # of the first backbone: the others differ in widths
EXTRA = (
    "method=full quant=int4 quant.linear=8",
    "method=side quant=tiny backbone.weights=int8",
    "method=side quant=tiny backbone.weights=nf4",
)
BATCH = 64
TYPED = {
    "x",
    "grad",
    "weight",
    "dtype",
}  # arguments of the type that a step computes in; tables and statistics have their own
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Like:
    """A tensor argument without its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


Call = tuple[str, tuple[tuple[str, Any], ...]]  # the operator, and its arguments by name


class Recorder(TorchDispatchMode):
    """Notes each call of an operator that has a kernel, once."""

    def __init__(self, calls: dict[Call, None]):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        if space == "s2a" and name in kernels.OPERATORS:
            given = dict(zip((argument.name for argument in func._schema.arguments), args)) | (kwargs or {})
            self.calls[name, tuple((key, _described(value)) for key, value in given.items())] = None
        return func(*args, **(kwargs or {}))


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Like(tuple(value.shape), value.stride(), value.dtype)
    return tuple(value) if isinstance(value, list) else value


def calls(words: Iterable[str], batch: int = BATCH) -> list[Call]:
    """What a training step of a run with these words of its config asks of the kernels, on a CUDA device."""
    found: dict[Call, None] = {}
    made = Made(Row("", "", ()), [*words, "backbone.pretrained=false"], torch.device("cpu"), meta=True)
    size = made.backbone.image.size
    images = torch.empty(batch, 3, size, size, dtype=made.step.dtype), torch.empty(batch, dtype=torch.int64)

    def step(*args, **kwargs):
        with Recorder(found):
            return made(*args, **kwargs)

    before, pointwise.in_one_pass = pointwise.in_one_pass, lambda x: True  # as on CUDA
    try:
        memory.predict(made.model, images, step, made.optimizer)
    finally:
        pointwise.in_one_pass = before
    return list(found)


class NoKernel(Exception):
    """A launcher left a call to plain PyTorch."""


@dataclass
class Built:
    kernel: Any  # what triton compiled
    name: str
    arguments: dict[str, Any]


@contextmanager
def compiling(target: GPUTarget) -> Iterator[list[Built]]:
    """Within, launchers compile for `target` and run nothing; the list grows by what they would have launched."""
    made: list[Built] = []
    function: Any = jit.JITFunction
    run = function.run

    def compiled(kernel, *args, grid=None, warmup=False, **kwargs):
        built = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        made.append(
            Built(
                built,
                f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}",
                dict(zip(kernel.arg_names, args)) | kwargs,
            )
        )

    def uncovered(name: str) -> Callable:
        def plain(*args):
            raise NoKernel(name)

        return plain

    class NoDevice:
        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: str(target.arch))  # under which kernels are cached
        get_current_stream = staticmethod(lambda device: 0)

    plain = {name: uncovered(name) for name in kernels.OPERATORS}
    before = jit.driver, launch.PLAIN, pooling.PLAIN
    function.run, jit.driver, launch.PLAIN, pooling.PLAIN = compiled, SimpleNamespace(active=NoDevice), plain, plain
    try:
        yield made
    finally:
        function.run = run
        jit.driver, launch.PLAIN, pooling.PLAIN = before


def replay(call: Call, dtype: torch.dtype) -> None:
    """Calls the launcher, in steps of this type. Raises NoKernel where it would call its plain twin."""
    name, given = call

    def typed(key: str, value: Any) -> Any:
        if isinstance(value, Like):
            value = value.made()
            return value.to(dtype) if key in TYPED and value.is_floating_point() else value
        return dtype if key == "dtype" else list(value) if isinstance(value, tuple) else value

    arguments = {key: typed(key, value) for key, value in given}
    getattr(launch, name)(*arguments.values())  # in the order of the schema


def resources(built: Built) -> dict[str, Any]:
    """What a compiled kernel takes. spills: bytes of the stack a thread; shared: bytes a program."""
    kernel, given = built.kernel, built.arguments
    metadata = kernel.metadata
    elements = given["ROWS"] * given["WIDTH"] if "ROWS" in given else given["BLOCK"]
    threads = metadata.num_warps * metadata.target.warp_size
    found = _sass(kernel.asm["cubin"]) if "cubin" in kernel.asm else _amdgcn(kernel.asm["amdgcn"])
    return found | {
        "shared": metadata.shared,
        "warps": metadata.num_warps,
        "an_element": round(found["instructions"] * threads / elements, 1),
    }


def _sass(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([BIN / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    ((registers, stack, local),) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)[:1]
    operations = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w+)", code, re.MULTILINE)
    instructions = len(operations) - operations.count("NOP")
    return {"registers": int(registers), "spills": int(stack) + int(local), "instructions": instructions}


def _amdgcn(code: str) -> dict[str, int]:
    registers, spilled, scratch = (
        int(re.findall(rf"\.{name}:\s+(\d+)", code)[0])
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    operations = re.findall(r"^\t((?:s|v|ds|global|buffer|flat)_\w+)", code, re.MULTILINE)
    idle = operations.count("s_nop") + operations.count("s_code_end")
    return {"registers": registers, "spills": 4 * spilled + scratch, "instructions": len(operations) - idle}


Table = tuple[list[dict], dict[str, list[str]]]


def table(
    steps: dict[str, list[Call]],
    targets: dict[str, GPUTarget],
    dtypes: Iterable[str],
    after: Callable[[Table], None] = lambda found: None,
) -> Table:
    """A row a kernel, specialisation, type and architecture; and, by operator, what ran plain.

    after: gets what there is so far.
    """
    listed, plain = [], collections.defaultdict(set)
    for arch, target in targets.items():
        for dtype in dtypes:
            seen = set()
            with compiling(target) as made:
                for words, known in steps.items():
                    for call in known:
                        made.clear()
                        try:
                            replay(call, DTYPES[dtype])
                        except NoKernel:
                            plain[call[0]].add(_said(call))
                        for built in made:
                            if built.kernel.hash in seen:
                                continue
                            seen.add(built.kernel.hash)
                            row = {
                                "operator": call[0],
                                "kernel": built.name,
                                "arch": arch,
                                "dtype": dtype,
                                "for": words,
                            }
                            listed.append(row | _constants(built) | resources(built))
            print(f"{arch} {dtype}: {len(seen)} kernels", file=sys.stderr, flush=True)
            after((listed, {name: sorted(said) for name, said in sorted(plain.items())}))
    return listed, {name: sorted(said) for name, said in sorted(plain.items())}


def _constants(built: Built) -> dict[str, Any]:
    kept = ("WIDTH", "GROUP", "BITS", "NORM", "FUNCTION", "CALIBRATED", "STRIDED", "BLOCK", "ROWS", "COLS", "KH", "KW")
    return {"constants": {key: built.arguments[key] for key in kept if key in built.arguments}}


def _said(call: Call) -> str:
    return ", ".join(
        f"{key} {list(value.shape)}" if isinstance(value, Like) else f"{key}={value}" for key, value in call[1]
    )


def traced(backbones: Iterable[str]) -> dict[str, list[Call]]:
    """The calls of steps of all presets, {words: calls}; each call is listed with the first words that make it."""
    found, seen = {}, set()
    for backbone in backbones:
        quants = QUANTS if found else (*QUANTS, *ALL_QUANTS)
        for words in [*(f"method=bias quant={quant}" for quant in quants), *EXTRA]:
            words = f"backbone={backbone} {words}"
            try:
                known = calls(words.split())
            except UserError as error:  # a backbone that this can't be had of
                print(f"{words}: {error}", file=sys.stderr)
                continue
            found[words] = [call for call in known if call not in seen]
            seen.update(known)
    return found


def page(listed: list[dict], plain: dict[str, list[str]], versions: str) -> str:
    """The Markdown: one line an operator, kernel and architecture, with the worst of all its specialisations."""
    lines = ["# What the kernels take", "", *_preface(versions), ""]
    lines += [
        "| operator | kernel | GPU | variants | registers | spills | shared, bytes | instructions an element |",
        "|" + "---|" * 8,
    ]
    worst: dict[tuple, list[dict]] = collections.defaultdict(list)
    for row in listed:
        worst[row["operator"], row["kernel"], row["arch"]].append(row)
    for key, rows in sorted(worst.items()):
        spread = sorted(row["an_element"] for row in rows)
        most = [max(row[name] for row in rows) for name in ("registers", "spills", "shared")]
        lines.append(
            f"| {' | '.join(key)} | {len(rows)} | {' | '.join(map(str, most))} | {spread[0]} to {spread[-1]} |"
        )
    lines += ["", "## LayerNorm of the backbones, instructions an element (4 bits, calibrated)", ""]
    norms = [
        row
        for row in listed
        if row["operator"] == "quantize_normalized" and row["constants"]["BITS"] == 4 and row["constants"]["CALIBRATED"]
    ]
    widths = sorted({row["constants"]["WIDTH"] for row in norms})
    lines += ["| GPU | type | " + " | ".join(map(str, widths)) + " |", "|" + "---|" * (2 + len(widths))]
    by_key = {
        (row["arch"], row["dtype"], row["constants"]["WIDTH"]): row["an_element"]
        for row in norms
        if not row["constants"]["STRIDED"]
    }
    for arch, dtype in dict.fromkeys((row["arch"], row["dtype"]) for row in norms):
        lines.append(
            f"| {arch} | {dtype} | " + " | ".join(str(by_key.get((arch, dtype, width), "")) for width in widths) + " |"
        )
    lines += ["", "## Calls that no kernel covers", ""]
    lines += [f"- `{name}`: {len(said)}, such as {said[0]}" for name, said in plain.items()] or ["None."]
    return "\n".join(lines) + "\n"


def _preface(versions: str) -> list[str]:
    return [
        (
            f"Compiled, not measured: {versions}. Made by `benchmarks/kernels/resources.py`, which says how; all rows"
            " are in `resources.json`."
        ),
        (
            "Registers a thread, spills in bytes a thread, and instructions of the whole program over the elements that"
            " a thread has in one pass;"
        ),
        "the largest of all variants (widths, bits, types) that the presets launch.",
    ]


def main(words: list[str]) -> None:
    given = dict(word.split("=", 1) for word in words)
    targets = {name: TARGETS[name] for name in given.get("arch", ",".join(TARGETS)).split(",")}
    steps = traced(given.get("backbone", ",".join(BACKBONES)).split(","))
    versions = f"triton {triton.__version__}, torch {torch.__version__}"
    out = Path(given.get("out", HERE))

    def write(found: Table) -> None:
        listed, plain = found
        head = {"versions": versions, "batch": BATCH, "plain": plain}
        out.joinpath("resources.json").write_text(
            json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(map(json.dumps, listed)) + "\n]}\n"
        )
        out.joinpath("resources.md").write_text(page(listed, plain, versions))

    table(steps, targets, given.get("dtype", ",".join(DTYPES)).split(","), write)


if __name__ == "__main__":
    main(sys.argv[1:])
