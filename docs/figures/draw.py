"""Draws the figures of how-it-works.md: `python docs/figures/draw.py`.

The figures in `KEPT` are what the page's own Python block prints, bytes an element of one ViT-B block's hidden state.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

HERE = Path(__file__).parent
INK, FAINT, PAPER = "#1f2430", "#5d6675", "#ffffff"
COLOURS = {
    "norms": "#4c78a8",
    "q, k, v": "#72b7b2",
    "attention's output": "#54a24b",
    "GELU": "#f58518",
    "inputs of linear layers": "#b9bfca",
    "the block's input": "#b279a2",
}
KEPT = (  # what is trained and how, then (what is kept, bytes an element)
    ("full fine-tuning", "stock PyTorch", (
        ("norms", 8), ("q, k, v", 12), ("attention's output", 4), ("GELU", 16), ("inputs of linear layers", 24))),
    ("bias tuning", "stock PyTorch", (("norms", 8), ("q, k, v", 12), ("attention's output", 4), ("GELU", 16))),
    ("bias tuning", "codes: quant=int4", (("norms", 1.1), ("q, k, v", 1.6), ("GELU", 2.0))),
    ("bias tuning", "recompute: quant=tiny", (("the block's input", 1.03),)),
)  # fmt: skip


def text(
    x: float, y: float, words: str, size: int = 14, fill: str = INK, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
    )


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", round: int = 4) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{round}" fill="{fill}" stroke="{stroke}"/>'


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str = INK, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="4 4"' if dashed else ""
    mark = f'marker-end="url(#{"grey" if colour == FAINT else "ink"})"'
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="1.5"{dash} {mark}/>'


def svg(name: str, width: int, height: int, title: str, parts: list[str]) -> None:
    heads = "".join(
        f'<marker id="{key}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{colour}"/></marker>'
        for key, colour in (("ink", INK), ("grey", FAINT))
    )
    page = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        f' font-family="system-ui, sans-serif"><title>{escape(title)}</title><defs>{heads}</defs>\n'
    )
    page += "\n".join([box(0, 0, width, height, PAPER, round=10), *parts]) + "\n</svg>\n"
    (HERE / name).write_text(page, encoding="utf-8")


def kept() -> None:
    left, scale, parts = 190, 8.2, []
    parts.append(
        text(20, 30, "Kept from one block for the backward pass, bytes an element of its hidden state", 15, bold=True)
    )
    for row, (trained, how, pieces) in enumerate(KEPT):
        y, x = 52 + 58 * row, float(left)
        parts += [text(20, y + 16, trained, 14, bold=True), text(20, y + 34, how, 12, FAINT)]
        for name, size in pieces:
            parts.append(box(round(x, 1), y, round(size * scale - 1, 1), 38, COLOURS[name], round=2))
            x += size * scale
        total = sum(size for _, size in pieces)
        parts.append(text(round(x + 8, 1), y + 25, f"{total:.1f}".removesuffix(".0"), 15, bold=True))
    for place, (name, colour) in enumerate(COLOURS.items()):
        x, y = 20 + 250 * (place % 3), 300 + 24 * (place // 3)
        parts += [box(x, y, 14, 14, colour, round=2), text(x + 22, y + 12, name, 13)]
    svg("kept.svg", 770, 350, "What one transformer block keeps for the backward pass", parts)


def batch() -> None:
    parts = [text(20, 30, "One batch's journey", 15, bold=True)]
    stages = (
        (20, "images", "[B, 3, H, W]"),
        (136, "stem", "frozen"),
        (252, "block 1", "frozen"),
        (446, "block L", "frozen"),
        (562, "head", "trained"),
        (678, "loss", "fp32"),
    )
    centre, end = {}, 0
    for x, name, about in stages:
        centre[name] = x + 46
        fill = "#fde3c8" if name == "head" else "#e8edf4"
        parts += [box(x, 92, 92, 52, fill, "#9aa5b5"), text(x + 46, 114, name, 14, anchor="middle", bold=True)]
        parts.append(text(x + 46, 133, about, 12, FAINT, "middle"))
        if end:
            parts.append(arrow(end + 2, 118, x - 3, 118))
        end = x + 92
    parts.append(text((centre["block 1"] + centre["block L"]) / 2, 108, "...", 16, FAINT, "middle"))
    parts += [text(20, 62, "forward: exact, as stock PyTorch computes it", 13, FAINT)]
    parts += [text(20, 330, "backward: the gradient is rounded where codes stand for what was kept", 13, FAINT)]
    for name in ("block 1", "block L"):
        x = centre[name]
        parts.append(text(x - 46, 84, "+ A B", 13, "#b3540a", bold=True))
        parts.append(text(x + 46, 84, "+ bias", 13, "#b3540a", "end", True))
        parts += [box(x - 46, 196, 92, 56, "#e3f1ee", "#72b7b2"), text(x, 216, "kept", 13, anchor="middle", bold=True)]
        parts += [
            text(x, 233, "codes, or the", 12, FAINT, "middle"),
            text(x, 247, "input in 8 bits", 12, FAINT, "middle"),
        ]
        parts += [arrow(x, 146, x, 193), arrow(x, 254, x, 287)]
    side = (centre["block 1"] + centre["block L"]) / 2
    parts += [
        box(side - 30, 196, 60, 56, "#fde3c8", "#f58518"),
        text(side, 220, "side", 13, anchor="middle", bold=True),
    ]
    parts += [text(side, 238, "logits", 12, FAINT, "middle")]
    parts += [
        arrow(centre["block 1"] + 30, 146, side - 18, 193, FAINT, True),
        arrow(centre["block L"] - 30, 146, side + 18, 193, FAINT, True),
    ]
    parts += [arrow(centre["loss"], 146, centre["loss"], 287)]
    for name in ("block 1", "block L"):
        parts += [
            box(centre[name] - 46, 289, 92, 22, "#e8edf4", "#9aa5b5"),
            text(centre[name], 305, "gradient", 12, anchor="middle"),
        ]
    parts += [
        box(centre["loss"] - 46, 289, 92, 22, "#e8edf4", "#9aa5b5"),
        text(centre["loss"], 305, "backward", 12, anchor="middle"),
    ]
    parts += [
        arrow(centre["loss"] - 48, 300, centre["block L"] + 48, 300),
        arrow(centre["block L"] - 48, 300, centre["block 1"] + 48, 300),
    ]
    parts.append(text(centre["block 1"] - 54, 305, "stops here", 12, FAINT, "end"))
    parts += [
        box(20, 352, 14, 14, "#fde3c8", "#f58518", 2),
        text(42, 364, "trained: head, side branch, biases, prompts A B", 13),
    ]
    parts += [box(400, 352, 14, 14, "#e8edf4", "#9aa5b5", 2), text(422, 364, "frozen", 13)]
    parts += [arrow(500, 359, 540, 359, FAINT, True), text(550, 364, "read, detached", 13)]
    svg("batch.svg", 790, 385, "One batch through a backbone with structures attached", parts)


if __name__ == "__main__":
    kept()
    batch()
