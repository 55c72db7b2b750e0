"""Reads the settings of structures from their source: an import of theirs would bring torch along, which takes seconds.

A structure's file declares its settings in plain statements: imports, constants, dataclasses and `Settings = ...`. Only
these are executed, and what stands on torch is left out. Where the settings themselves do, the file is imported.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import importlib
import sys
from collections.abc import Container, Iterator, Mapping
from types import ModuleType
from typing import Any

from s2a_cli.config.overrides import PACKAGE

HOME = "s2a_cli.methods"
FOLDER = PACKAGE / "methods"
LIGHT = (
    "s2a_cli.config",
    "s2a_cli.common.errors",
    "s2a_cli.common.text",
)  # imported as they are, with the standard library
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Structures(Mapping[str, type]):
    """{name of a structure: the dataclass of its settings}, each read when it is first asked for."""

    def __init__(self) -> None:
        files = sorted(FOLDER.glob("*.py"))
        self._names = [path.stem for path in files if "\nSTRUCTURE = " in path.read_text(encoding="utf-8")]
        self._found: dict[str, type] = {}

    def __getitem__(self, name: str) -> type:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._found:
            self._found[name] = _settings(name)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


STRUCTURES = Structures()


def _settings(name: str) -> type:
    """Returns the dataclass of the settings of the structure in `methods/<name>.py`."""
    declared = getattr(vars(declarations(name)).get("STRUCTURE"), "Settings", None)
    return declared or importlib.import_module(f"{HOME}.{name}").STRUCTURE.Settings


def declarations(name: str) -> ModuleType:
    """Returns a module of what `methods/<name>.py` declares without torch; classes are without their functions."""
    full = f"{__name__}.{name}"
    if full in sys.modules:
        return sys.modules[full]
    path = FOLDER / f"{name.replace('.', '/')}.py"
    module = sys.modules[full] = ModuleType(full)  # where dataclasses look up the names in their annotations
    known = vars(module)
    for node in ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else ():  # or it is a folder
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{HOME}."):
            there = vars(declarations((node.module or "").removeprefix(f"{HOME}.")))
            known |= {one.asname or one.name: there[one.name] for one in node.names if one.name in there}
        elif kept := _without_torch(node, {*known, *vars(builtins)}):
            flags = __future__.annotations.compiler_flag
            exec(compile(ast.Module([kept], []), path, "exec", flags, dont_inherit=True), known)
    return module


def _without_torch(node: ast.stmt, known: Container[str]) -> ast.stmt | None:
    """Returns a statement, a class without its functions; None for one that needs other names than those known."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
        return node if all(map(_is_light, modules)) else None
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr | ast.FunctionDef | ast.Pass):
        return node if _stands(node, known) else None
    if not isinstance(node, ast.ClassDef) or not all(
        _stands(one, known) for one in (*node.bases, *node.decorator_list)
    ):
        return None
    body = {inner: _without_torch(inner, known) for inner in node.body if not isinstance(inner, FUNCTIONS)}
    lost = [inner for inner, kept in body.items() if kept is None]
    if any(node.decorator_list or "Settings" in _bound(inner) for inner in lost):  # a dataclass would lack a field
        return None
    node.body = [kept for kept in body.values() if kept is not None] or [ast.copy_location(ast.Pass(), node)]
    return node


def _is_light(module: str) -> bool:
    """Tells whether a module can be imported without torch."""
    return module.partition(".")[0] in sys.stdlib_module_names or module.startswith(LIGHT)


def _stands(node: ast.AST, known: Container[str]) -> bool:
    """Tells whether a statement or expression needs only known names when it is executed."""
    if isinstance(node, ast.AnnAssign):
        return node.value is None or _stands(node.value, known)
    parts: list[Any] = [node]
    if isinstance(node, ast.FunctionDef):  # its body runs later
        parts = [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
    names = [inner for part in parts for inner in ast.walk(part) if isinstance(inner, ast.Name)]
    arguments = {inner.arg for part in parts for inner in ast.walk(part) if isinstance(inner, ast.arg)}
    own = arguments | {name.id for name in names if isinstance(name.ctx, ast.Store)}
    return all(name.id in known or name.id in own for name in names)


def _bound(node: ast.stmt) -> list[str]:
    """Returns the names that a statement binds."""
    if isinstance(node, ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
