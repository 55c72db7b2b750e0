"""What accept.py asks: its tasks, the most important first, for a device and for the small form."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

from accept_pool import Task
from rows import BY_NAME, ROWS

BACKBONES = {
    name: [f"backbone={name}", "backbone.pretrained=false"] for name in ("vit_b", "swin_b", "convnext_b", "resnet50")
}
SMALL = {  # the same layers, in seconds on a CPU
    "vit_micro": [
        "backbone=vit_micro",
        "backbone.kwargs.depth=2",
        "backbone.checkpoint=null",
        "backbone.pretrained=false",
    ],
    "resnet10t": [
        *(
            "backbone=timm",
            "backbone.name=resnet10t",
            "backbone.timm=resnet10t",
            "backbone.image_size=32",
            "backbone.pretrained=false",
        ),
    ],
}
# The first pairs stand for all; the others follow in the order of these lists.
FIRST = (
    ("full", "none"),
    ("bias", "none"),
    ("bias", "int4"),
    ("bias", "tiny"),
    ("s2a", "tiny"),
    ("side", "tiny"),
    ("s2a", "int4"),
)
METHODS, QUANTS = ("full", "bias", "s2a", "side", "prompt"), ("none", "int4", "tiny", "paper", "int5", "exact")
SIZES_GIB = (4, 6, 8, 12, 16, 24)  # of devices
CHECKED = ("T1", "T2-int4", "T2", "T3")  # rows whose steps give the kernels their arguments
PROFILED = ("bias", "T2-int4", "T3", "full", "bias-micro4", "bias-micro4-graph", "bias-ckpt", "T3-s2a", "T4")
COMPILED = tuple(row.name for row in ROWS if row.budget is not None)
LAST = (  # of the rows in a race: the first to go where there is no room, or no time
    *(
        "only-pointwise",
        "only-norm",
        "only-attention",
        "full-unfused",
        "lora-ckpt",
        "T5-T3-nf4",
        "T5-T4-nf4",
        "segments",
        "segments-int4",
        "T1",
        "T2-s2a",
        "T2-int4-micro8",
        "T4-8",
        "T5-T4-int8",
        "bias-offload",
    ),
)
KERNELS_MIB, COMPILE_MIB = 3000.0, 8000.0  # of the device, roughly
BATCHES = (
    (22, 64),
    (12, 32),
    (0, 16),
)  # GiB of the device, images a step: full fine-tuning of ConvNeXt-B with 64 takes 15 GiB


@dataclass(frozen=True)
class Plan:
    """device: cuda | cpu.

    batch: images a step. races: (backbone, precision) whose rows are timed, hosts: that are profiled.
    """

    device: str
    batch: int
    steps: int = 12  # timed, of each row
    backbones: dict[str, list[str]] = field(default_factory=lambda: BACKBONES)
    precisions: tuple[str, ...] = ("fp32", "bf16")
    pairs: tuple[tuple[str, str], ...] = tuple(dict.fromkeys((*FIRST, *itertools.product(METHODS, QUANTS))))
    checked: tuple[str, ...] = CHECKED
    rows: tuple[str, ...] = tuple(row.name for row in ROWS)
    races: tuple[tuple[str, str], ...] = (
        ("vit_b", "bf16"),
        ("vit_b", "tf32"),
        ("swin_b", "bf16"),
        ("resnet50", "bf16"),
        ("convnext_b", "bf16"),
    )
    hosts: tuple[tuple[str, str], ...] = (("vit_b", "bf16"),)
    profiled: tuple[str, ...] = PROFILED

    @classmethod
    def of(cls, device: str, small: bool, total_mib: float | None, batch: int | None) -> Plan:
        if not small:
            chosen = next(images for gib, images in BATCHES if (total_mib or 0) >= gib * 1024)
            return cls(device, batch or chosen)
        checked = CHECKED if device == "cuda" else ("T2-int4",)
        rows = (
            "full",
            "bias",
            "bias-ckpt",
            "bias-micro2",
            *(COMPILED[:1] if device == "cuda" else ()),
            "T2-int4",
            "T3",
            "T4",
        )
        pairs = (("full", "none"), ("bias", "none"), ("bias", "int4"), ("full", "int4"), ("s2a", "tiny"))
        race = (("vit_micro", "bf16" if device == "cuda" else "fp32"),)
        return cls(device, batch or 16, 3, SMALL, ("fp32", "bf16"), pairs, checked, rows, race, race, PROFILED[:3])

    def of_memory(self) -> Plan:
        """Returns the part that needs no idle device."""
        return replace(self, checked=(), races=(), hosts=())

    def ask(self, kind: str, backbone: str, precision: str, **more: Any) -> dict[str, Any]:
        words = [*self.backbones[backbone], f"precision={precision}", f"optim.batch_size={self.batch}"]
        return {"kind": kind, "backbone": backbone, "precision": precision, "words": words, "batch": self.batch} | more

    def places(self) -> list[tuple[str, str]]:
        return list(itertools.product(self.backbones, self.precisions))

    def measures(self) -> list[Task]:
        """The memory of every combination."""
        return [
            Task(
                f"memory {backbone} {precision} {method} {quant}",
                self.ask("measure", backbone, precision, method=method, quant=quant),
                90,
                90,
            )
            for method, quant in self.pairs
            for backbone, precision in self.places()
        ]

    def predictions(self) -> list[Task]:
        """Of what is measured, and of the first races, the compiler's rows apart."""
        of_memory = [
            Task(f"predicted {task.name}", task.ask | {"kind": "predict"}, 120, 120) for task in self.measures()
        ]
        of_speed = [
            Task(f"predicted {backbone} {precision} {row}", self.ask("predict", backbone, precision, row=row), 120, 120)
            for backbone, precision in self.races[:2]
            for row in self.rows
            if row not in COMPILED
        ]
        return of_memory + of_speed

    def checks(self) -> list[Task]:
        """Kernels beside their twins; the first call of each builds it.

        Triton's interpreter takes seconds a step: few of them.
        """
        places = self.places()[::3]
        if self.device == "cuda":
            places = [*self.places(), (next(iter(self.backbones)), "amp-fp16")]
        return [
            Task(
                f"kernels {backbone} {precision} {row}",
                self.ask("kernels", backbone, precision, row=row),
                120,
                120,
                KERNELS_MIB,
            )
            for row in self.checked
            for backbone, precision in places
        ]

    def order(self) -> list[str]:
        """The rows as a race takes them: the compiler's first, where a process that hangs costs least."""
        return sorted(self.rows, key=lambda row: (row not in COMPILED, row in LAST))

    def compilations(self) -> list[Task]:
        return [
            Task(
                f"compile {backbone} {precision} {row}",
                self.ask("compile", backbone, precision, row=row),
                240,
                240,
                COMPILE_MIB,
            )
            for backbone, precision in self.races[:1]
            for row in self.rows
            if row in COMPILED
        ]

    def profiles(self) -> list[Task]:
        return [
            Task(
                f"host {backbone} {precision} {row}",
                self.ask("host", backbone, precision, row=row, steps=self.steps),
                60,
                60,
            )
            for backbone, precision in self.hosts
            for row in self.profiled
        ]


def fitting(rows: list[str], predicted: dict[str, dict[str, float]], room_mib: float) -> tuple[list[str], list[str]]:
    """(rows that fit a device side by side, those left out): the weights and states of all, and the step of the
    largest.

    predicted: {row: its prediction}; a row without one takes none. The compiler's rows count as stock PyTorch's.
    """
    chosen, static, step = [], 0.0, 0.0
    for row in rows:
        found = predicted.get("bias" if row in COMPILED else row) or {}
        own, peak = found.get("static_mib") or 0.0, found.get("peak_mib") or 0.0
        if static + own + max(step, peak - own) <= room_mib:
            chosen.append(row)
            static, step = static + own, max(step, peak - own)
    return chosen, [row for row in rows if row not in chosen]


def title(row: str) -> str:
    return BY_NAME[row].title
