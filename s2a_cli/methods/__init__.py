"""WHAT IS TRAINED. One file a structure; its name is the file's name, in `conf/method/` and in every table.

A structure is attached to a backbone whose parameters are all frozen but the head's. It unfreezes parameters and adds
modules; it never asks which family the backbone belongs to. A method is one structure, or several:
`method=side`, `method=[bias,side]`.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from typing import Any

from s2a_cli.backbones import Backbone
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import Structure

__all__ = ["STRUCTURES", "Attachment", "Structure", "attach", "keeps_codable"]

STRUCTURES: dict[str, type[Structure]] = {
    module.name: importlib.import_module(f"{__name__}.{module.name}").STRUCTURE
    for module in pkgutil.iter_modules(__path__)
    if module.name not in ("base", "attachment") and not module.ispkg
}


def keeps_codable(name: str) -> bool:
    """Whether a method (`side`, `bias+side`) keeps anything that codes of activations can stand for."""
    return any(STRUCTURES[one].keeps_codable for one in name.split("+"))


def attach(method: Any, backbone: Backbone) -> Attachment:
    """Attaches the structures that a config names (`config.method`) to a backbone, which may be on the meta device.

    Those that put layers of their own in the place of the backbone's come after those that adapt it otherwise. Those
    that leave the backbone as it is come last: they are told which others adapt it.
    Raises UserError for settings that do not fit the backbone.
    """
    names = method.name.split("+")
    structures = [STRUCTURES[name](method if len(names) == 1 else method[name]) for name in names]
    parts: list[Attachment] = []
    for structure in sorted(structures, key=lambda structure: (not structure.adapts, structure.replaces_layers)):
        made = structure.attach(backbone, parts)
        parts.append(replace(made, replaces_layers=structure.replaces_layers))
    return Attachment.of(parts)
