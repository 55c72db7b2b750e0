"""Every structure: what it trains against what is published, how its forward function was checked, and its memory.

    .venv/bin/python benchmarks/structures/structures.py [--only NAME...] [--fresh]

Takes each structure of s2a_cli.methods at its defaults. Counts trained parameters on ViT-B/16 at 224 px, without the
head, and predicts the peak of a step (64 images, fp32, AdamW, 100 classes) on ViT-B, ConvNeXt-B and Swin-B in stock
PyTorch (none), with every block computed again from its exact input in 8 chunks of the batch (exact), and with
quant=int4 and quant=tiny quant.chunks=8. references.csv, beside this file, says what each forward function was compared
with. Writes structures.json here, in which figures are kept, and docs/results/structures.md. --fresh: all anew.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from pathlib import Path
from typing import Any

from peaks import CODES, predicted

from s2a_cli.common import files
from s2a_cli.common.progress import Progress
from s2a_cli.methods import STRUCTURES, Structure
from s2a_cli.methods.base import FAMILIES

HERE = Path(__file__).parent
FIGURES, REFERENCES = HERE / "structures.json", HERE / "references.csv"
PAGE = HERE.parents[1] / "docs" / "results" / "structures.md"
BACKBONES = {"vit_b": "ViT-B", "convnext_b": "ConvNeXt-B", "swin_b": "Swin-B"}
NUMBER = re.compile(r"\d\.\d+e[+-]\d+")
OF_FAMILY = {"vit": "vit_b", "convnext": "convnext_b", "swin": "swin_b"}
TEXT = """# Every structure, verified

Made by the command below. **Trained**: parameters on ViT-B/16 at 224 px, without the head, against what the source of
the structure says: within 2 %, or half a unit of its last digit, or explained. **Compared with**: public code, run on
the same random weights; the largest difference of its outputs from ours. (Of head2toe, lst, qst, res_tuning and
side_tuning parts of that code are written again: `references.csv` says which. adapter_pfeiffer, convpass, hst, lst,
qst and side_tuning were compared before their sums were written in another order, to keep less: in fp64 that rounds
otherwise by up to 1e-15.) Starts pretrained: before the first
step the function is the backbone's own. Merges: after training, plain weights of the backbone compute the same.
[One tester](../../tests/methods/test_every_structure.py) holds every structure to this, and to more, on each family of
backbones that it names.

<!-- needs: minutes -->
```sh
.venv/bin/pip install '.[peft]'
.venv/bin/python benchmarks/structures/structures.py
```

{verified}

## Predicted peaks

Of a step of 64 images at 224 px, fp32, AdamW, 100 classes, in MiB. none: stock PyTorch. exact: every block is computed
again from its exact input, in 8 chunks of the batch. int4: `quant=int4`. tiny: `quant=tiny quant.chunks=8`. Predicted,
not measured.

{peaks}
"""
References = dict[str, list[dict[str, str]]]  # structure -> the comparisons of its forward function
Figures = dict[str, dict[str, dict[str, Any]]]  # structure -> "backbone codes" -> what `predicted` returns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(STRUCTURES), choices=list(STRUCTURES), metavar="NAME")
    parser.add_argument("--fresh", action="store_true")
    args = parser.parse_args()
    figures: Figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    with Progress("structures", len(args.only), " structures") as progress:
        for name in args.only:
            known = {} if args.fresh else figures.get(name, {})
            wanted = [f"{backbone} {codes}" for backbone in _backbones(STRUCTURES[name]) for codes in CODES]
            figures[name] = {key: known.get(key) or _figure(name, key) for key in wanted}
            files.atomic_write(FIGURES, json.dumps(dict(sorted(figures.items())), indent=1) + "\n")
            progress.add(1)
    with REFERENCES.open(newline="") as file:
        references: References = {}
        for row in csv.DictReader(file):
            references.setdefault(row["structure"], []).append(row)
    shown = {name: figures[name] for name in STRUCTURES if name in figures}
    files.atomic_write(PAGE, page(shown, references))
    print(f"written: {FIGURES}, {PAGE}")


def _backbones(structure: type[Structure]) -> list[str]:
    """Those of BACKBONES that a structure fits."""
    return [OF_FAMILY[family] for family in structure.families if family in OF_FAMILY]


def _figure(name: str, key: str) -> dict[str, Any]:
    backbone, codes = key.split()
    return predicted(backbone, [f"method={name}"], codes)


def page(figures: Figures, references: References) -> str:
    """The page in markdown."""
    verified, peaks = "\n".join(_verified(figures, references)), "\n".join(_peaks(figures))
    return TEXT.format(verified=verified, peaks=peaks)


def _verified(figures: Figures, references: References) -> list[str]:
    lines = _head("`method=`", "trained, M", "published, M", "starts pretrained", "merges", "fits", "compared with")
    notes = []
    for name, found in figures.items():
        kind, on_vit = STRUCTURES[name], found.get("vit_b none", {})
        trained = f"{on_vit['trainable'] / 1e6:.3f}" if "trainable" in on_vit else ""
        published = ""
        if kind.published:
            mark = ""
            if kind.published.difference:
                notes.append(f"{len(notes) + 1}. `{name}`: {kind.published.difference}")
                mark = f" ({len(notes)})"
            published = f"{kind.published.millions:g}{mark}"
        any_figure = next((figure for figure in found.values() if "merges" in figure), {"merges": None})
        merges = {True: "yes", False: "", None: ""}[any_figure["merges"]]
        fits = "all" if set(kind.families) == set(FAMILIES) else ", ".join(kind.families)
        cells = [f"`{name}`", trained, published, "yes" if kind.starts_pretrained else "", merges, fits]
        lines.append(_row(*cells, _reference(references.get(name, []))))
    return [*lines, "", *notes]


def _reference(rows: list[dict[str, str]]) -> str:
    """Where the public code is, and the largest of all differences from it."""
    if not rows:
        return ""
    where = f"{rows[0]['repository']}@{rows[0]['commit'][:7]}" if rows[0]["commit"] else rows[0]["repository"]
    differences = [row["largest difference"] for row in rows]
    numbers = [float(text) for text in differences if NUMBER.fullmatch(text)]
    largest = f"{max(numbers):.0e}" if any(numbers) else "0" if numbers else differences[0]
    return f"{where}: {largest}"


def _peaks(figures: Figures) -> list[str]:
    lines = _head("`method=`", *(f"{title} {codes}" for title in BACKBONES.values() for codes in CODES))
    for name, found in figures.items():
        cells = []
        for backbone in BACKBONES:
            for codes in CODES:
                figure = found.get(f"{backbone} {codes}")
                cells.append("–" if figure is None else _peak(figure))
        lines.append(_row(f"`{name}`", *cells))
    return lines


def _peak(figure: dict[str, Any]) -> str:
    return f"{figure['peak_mib']:,.0f}" if "peak_mib" in figure else "no figure"


def _head(*titles: str) -> list[str]:
    return [_row(*titles), _row("---", *["---:"] * (len(titles) - 1))]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
