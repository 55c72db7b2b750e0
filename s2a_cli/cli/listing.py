"""`s2a ls`: what there is, without an import of torch."""

from __future__ import annotations

import ast
from pathlib import Path

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import nearest

KINDS = {kind + "s": kind for kind in ("backbone", "method", "quant", "dataset", "experiment")}  # what `ls` lists


def ls(words: list[str]) -> int:
    """Prints the options of each group with a line about each."""
    if odd := [word for word in words if word not in KINDS]:
        raise UserError(f"ls {odd[0]}: expected one of {', '.join(KINDS)}{nearest(odd[0], KINDS)}")
    from s2a_cli.config.overrides import CONF, groups

    options = groups()
    for kind in words or KINDS:
        group = KINDS[kind]
        if len(words) != 1:
            print(f"{kind} ({group}=NAME)")
        width = max((len(name) for name in options.get(group, [])), default=0)
        for name in options.get(group, []):
            about = _docstring(name) if kind == "methods" else _comment(CONF / group / f"{name}.yaml")
            print(f"  {name:<{width}} {about}")
    return 0


def _comment(path: Path) -> str:
    """Returns the leading comment lines of a config file, Hydra's own `# @package` apart."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            lines.append(line.lstrip("# "))
    return "  ".join(lines)


def _docstring(method: str) -> str:
    """Returns the first line of the docstring of a method's class, read without an import of torch."""
    body = ast.parse((Path(__file__).parents[1] / "methods" / f"{method}.py").read_text(encoding="utf-8")).body
    assigned = {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in body if isinstance(node, ast.Assign)}
    found = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == assigned["STRUCTURE"])
    return (ast.get_docstring(found) or "").split("\n")[0]
