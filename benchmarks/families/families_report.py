"""The table of benchmarks/families/families.py, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

METHODS = ("full", "linear", "bias", "prompt", "side", "s2a")
EXACT_ERROR = 1e-6  # relative error of a gradient in float64 that differs by rounding alone
LOW = 0.95  # cosine of a gradient below which a row has a control


def usable(row: dict[str, Any]) -> list[str]:
    """The methods that train this family's model, with the default way to keep activations."""
    methods = row.get("methods") or {}
    return [
        name for name in METHODS if isinstance(methods.get(name), dict) and isinstance(methods[name].get("int4"), float)
    ]


def figures(row: dict[str, Any], kind: str) -> list[float]:
    found = [cells.get(kind) for cells in (row.get("methods") or {}).values() if isinstance(cells, dict)]
    return [value for value in found if isinstance(value, float)]


def controlled(rows: list[dict[str, Any]], control: str, figure: Callable[[dict[str, Any]], float]) -> Iterator[str]:
    """The rows that have this control, with the figure and the control's."""
    for row in rows:
        for name, cells in (row.get("methods") or {}).items():
            if isinstance(cells, dict) and control in cells:
                yield f"{row['family']} {name} {figure(cells):.2g} ({cells[control]:.2g})"


def line(row: dict[str, Any]) -> str:
    structure, kept = row["structure"], row["kept"]
    layouts = structure["layouts"]
    layouts = ", ".join(f"{count} {name}" for name, count in layouts.items()) if isinstance(layouts, dict) else layouts
    wrong = f" **misread: {len(structure['wrong'])}**" if structure["wrong"] else ""
    names = usable(row)
    cells = [
        f"{row['family']}: {row['model']}, {row['size']} px",
        f"{layouts}{wrong}" + (f"; {structure['head']} heads" if structure["head"] > 1 else ""),
        "all" if len(names) == len(METHODS) else ", ".join(names) or "none",
        f"{max(figures(row, 'lossless') + figures(row, 'recomputed'), default=float('nan')):.0e}",
        *(f"{min(figures(row, kind), default=float('nan')):.4f}" for kind in ("int4", "tiny")),
        *(
            [
                f"{kept['none']:.1f}",
                *(
                    f"{kept[q]:.2f} ({kept['none'] / kept[q]:.1f}x)" if kept[q] > 0.005 else "0"
                    for q in ("int4", "tiny")
                ),
            ]
            if isinstance(kept, dict)
            else [kept, "", ""]
        ),
        (
            ", ".join(f"{share:.3f}" for share in row["tracked"].values())
            if isinstance(row["tracked"], dict)
            else row["tracked"]
        ),
    ]
    return "| " + " | ".join(cells) + " |"


def summary(rows: list[dict[str, Any]]) -> list[str]:
    usual = [row for row in rows if "s2a" in usable(row)]
    misread = [row["family"] for row in rows if isinstance(row.get("structure"), dict) and row["structure"]["wrong"]]
    inexact = list(controlled(rows, "stock, image by image", lambda cells: max(cells["lossless"], cells["recomputed"])))
    low = list(
        controlled(
            rows,
            "stock, bf16",
            lambda cells: min(cells[kind] for kind in ("int4", "tiny") if isinstance(cells[kind], float)),
        )
    )
    changed = [
        r["family"]
        for r in rows
        for cells in (r.get("methods") or {}).values()
        if isinstance(cells, dict) and cells["changed though frozen"]
    ]
    shares = [share for row in rows if isinstance(row.get("tracked"), dict) for share in row["tracked"].values()]
    near = sum(abs(share - 1) <= 0.01 for share in shares)
    return [
        f"- {len(usual)} of {len(rows)} families train with the default method and codes (`method=s2a quant=int4`).",
        (
            f"- Layouts that contradict the widths of a block's own layers: {', '.join(misread) or 'none'} of"
            f" {sum('structure' in row for row in rows)}."
        ),
        (
            f"- Gradients under lossless savings or recomputation that are off by more than {EXACT_ERROR:g}; in"
            f" brackets stock PyTorch's own, image by image instead of all at once: {', '.join(inexact) or 'none'}."
        ),
        (
            f"- Cosines of gradients under `int4` or `tiny` below {LOW:g}; in brackets that of stock PyTorch in"
            f" bfloat16, since random weights may amplify any rounding: {', '.join(low) or 'none'}."
        ),
        f"- Frozen tensors that a step changed: {', '.join(dict.fromkeys(changed)) or 'none'}.",
        f"- Predicted peaks within 1 % of those of real tensors: {near} of {len(shares)}.",
    ]


def table(result: dict[str, Any]) -> str:
    rows, about = result["rows"], result["environment"]
    done = [row for row in rows if row.get("model")]
    failed = [f"- {row['family']}: {row['failed']}" for row in rows if not row.get("model")]
    head = [
        "# Every family of timm",
        "",
        (
            "The smallest model of each family with random weights, through six methods (full, linear, bias, prompt,"
            " side, s2a), made by"
            f" `benchmarks/families/families.py`; timm {about.get('timm')}, torch {about.get('torch')}, on a CPU."
            " Memory is predicted."
        ),
        "",
        *summary(rows),
        *failed,
        "",
        (
            "Columns: hidden states at the blocks' outputs; methods that train with `quant=int4`; the largest relative"
            " error of a gradient"
        ),
        (
            "in float64 under `quant=exact` and under recomputation from whole inputs, over the methods; the least"
            " cosine of a gradient under `int4` and"
        ),
        (
            "`tiny`; MiB kept for the backward pass by bias tuning, an image of the model's own size; predicted peak"
            " over that of the same"
        ),
        (
            "step on real tensors of the CPU, for bias with stock, bias with int4 and s2a with tiny. Where these"
            " differ, the CPU's own kernels lay results out in another way, or compute weights' gradients that nobody"
            " asked for."
        ),
        "",
        (
            "| family: model | blocks | methods | exact: error | int4: cosine | tiny: cosine | kept, stock | int4 |"
            " tiny | peak |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *map(line, done)]) + "\n"
