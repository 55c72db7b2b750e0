"""WHAT IS TRAINED. One file a method; its name is the file's name, in `conf/method/` and in every table.

A method is attached to a backbone whose parameters are all frozen but the head's. It unfreezes parameters and adds
modules; it never asks which family the backbone belongs to.
"""

from __future__ import annotations

import importlib
import pkgutil

from s2a_cli.methods.base import Method

__all__ = ["METHODS", "Method"]

METHODS: dict[str, type[Method]] = {
    module.name: importlib.import_module(f"{__name__}.{module.name}").METHOD
    for module in pkgutil.iter_modules(__path__)
    if module.name != "base" and not module.ispkg
}
