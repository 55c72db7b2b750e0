"""Imports run one way: a room uses itself and those before it, and no module needs one that needs it."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import s2a_cli

PACKAGE = Path(s2a_cli.__file__).parent
ROOMS = (
    *("common", "config", "activations", "memory", "data", "backbones"),
    *("methods", "results", "training", "planner", "library", "sweeps", "cli"),
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py") if "conf" not in path.parts}


def imported(path: Path, at_start: bool) -> list[tuple[str, int]]:
    """(module of s2a_cli, line) of each import; with `at_start` of those that run when the module is imported."""
    tree, skipped = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        is_typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if at_start and (is_typing or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            skipped.update(id(inner) for inner in ast.walk(node))
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner if inner in FILES else node.module, node.lineno))
    return [(name, line) for name, line in found if name.split(".")[0] == "s2a_cli"]


def test_every_room_is_known():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))} == {*ROOMS}


def test_no_import_runs_upward():
    """Also of those within functions and for types alone. What all may ask of the package itself is its version."""
    wrong = []
    for name, path in FILES.items():
        room = name.split(".")[1] if "." in name else None
        for target, line in imported(path, at_start=False):
            above = target.split(".")[1] if "." in target else None
            if room in ROOMS and above in ROOMS and ROOMS.index(above) > ROOMS.index(room):
                wrong.append(f"{path}:{line}: {room} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_imports_form_a_circle():
    graph = {}
    for name, path in FILES.items():
        if name != "s2a_cli":
            graph[name] = {target for target, _ in imported(path, at_start=True)} - {name, "s2a_cli"}
            # The package of a module is imported before it; what a package hands on is its modules' own.
            graph[name] = {t for t in graph[name] if not name.startswith(f"{t}.")}
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_memory_activations_and_data_know_no_run():
    """The rooms of the engine stand without what is above them."""
    below = {"memory": ROOMS[:4], "activations": ROOMS[:3], "data": ("common", "config", "data")}
    for room, allowed in below.items():
        for name, path in FILES.items():
            if name.startswith(f"s2a_cli.{room}"):
                used = {target.split(".")[1] for target, _ in imported(path, at_start=False) if "." in target}
                assert used <= {*allowed}, f"{path} imports {used - {*allowed}}"
