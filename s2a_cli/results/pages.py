"""Fills in the templates of the pages: self-contained HTML, in which Jinja escapes all texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from s2a_cli.results import plots


def render(template: str, **values: Any) -> str:
    """Returns the page that a template of this folder makes of the values, without an address that would be loaded."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)


def drawn(panels: plots.Panels, name: str) -> dict[str, Any]:
    """Returns figures as the macro `figures` takes them; name: keeps their ids apart from those of others."""
    figures = [
        {"title": title, "svg": plots.svg(figure, f"{name}{number}")}
        for number, (title, figure) in enumerate(panels.figures)
    ]
    legend = [
        {"name": str(handle.get_label()), "svg": plots.swatch(handle, f"{name}key{number}")}
        for number, handle in enumerate(panels.legend)
    ]
    return {"panels": figures, "legend": legend}
