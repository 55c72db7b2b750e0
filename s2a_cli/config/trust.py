"""Checks of a config that somebody else has written: it may name settings, but read, load and write nothing."""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import brief, nearest

DEEPEST = 8  # levels of a stored config; a run's own has four
# Arguments of timm.create_model, and of what it calls, that choose what is loaded, from where, or what is returned.
LOADERS = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn"),
    *("pretrained_model_args", "checkpoint_path", "cache_dir", "state_dict", "url", "file", "hf_hub_id"),
    *("custom_load", "source", "scriptable", "exportable", "no_jit", "model_cfg", "feature_cfg", "feature_cls"),
    *("kwargs_filter", "features_only"),
)
OURS = ("num_classes", "device", "dtype", "cfg", "self")  # decided elsewhere
BUILT = ("bn_eps", "bn_momentum", "bn_tf")  # arguments that timm hands to layers before a model's constructor sees them
NESTED = ("transformer_", "conv_")  # before fields of a config within a config: MaxViT, CoAtNet
WORD = r"[\w.+ -]{0,64}"  # a text that names a layer, a pooling, a kind; no path and no address
LARGEST = 2**16


def check_stored(stored: Any) -> None:
    """Raises UserError for a stored config that is more than settings: one that refers to anything, or nests deeply."""
    todo = [("config", stored, 0)]
    while todo:
        key, value, depth = todo.pop()
        if depth > DEEPEST:
            raise UserError(f"{brief(key)}: the stored config is nested deeper than any run's")
        if isinstance(value, dict | list):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            for name, one in inner:
                todo += [(f"{key}.{name}", name, depth + 1), (f"{key}.{name}", one, depth + 1)]
        elif isinstance(value, str) and "${" in value:
            raise UserError(
                f"{brief(key)}={brief(value)}: a stored config refers to nothing (${{...}}); a run stores values"
            )
    if not isinstance(stored, dict):
        raise UserError(f"config={brief(str(stored))}: the stored config is no settings")


def check_kwargs(kwargs: dict[Any, Any]) -> dict[str, str]:
    """Returns what is wrong with backbone.kwargs: {key: one line}.

    Whether the model takes them is checked where the model is made.
    """
    problems: dict[str, str] = {}
    for name, value in kwargs.items():
        key = f"backbone.kwargs.{brief(str(name))}"
        if name in LOADERS:
            problems[key] = (
                f"{key}: chooses what is loaded, not what the model is; backbone.checkpoint=FILE gives weights"
            )
        elif name in OURS:
            problems[key] = f"{key}: not a setting here"
        elif not _plain(value):
            shown = brief(str(value))
            problems[key] = f"{key}={shown}: expected a number below {LARGEST}, true, false, a word, or a list of these"
    return problems


def _plain(value: Any, depth: int = 0) -> bool:
    """Returns whether a value is a number, a flag, a word, null, or a short list of these."""
    if isinstance(value, list | tuple):
        return depth < 4 and len(value) <= 1000 and all(_plain(one, depth + 1) for one in value)
    if isinstance(value, str):
        return re.fullmatch(WORD, value) is not None
    return value is None or (isinstance(value, bool | int | float) and math.isfinite(value) and abs(value) <= LARGEST)


def check_names(architecture: str, names: Iterable[str]) -> None:
    """Raises UserError for a name in backbone.kwargs that this architecture of timm's does not take."""
    known = shaping(architecture)
    for name in names:
        bare = next((name.removeprefix(prefix) for prefix in NESTED if name.startswith(prefix)), name)
        if name not in known and (bare not in known or bare in OURS):
            raise UserError(
                f"backbone.kwargs.{brief(name)}: {architecture} takes no such setting{nearest(name, known)}"
            )


@functools.lru_cache(maxsize=8)
def shaping(architecture: str) -> frozenset[str]:
    """Returns the names of the settings that shape a model: the arguments of the classes in its timm module."""
    import timm.models
    from torch import nn

    family = vars(sys.modules[timm.models.model_entrypoint(architecture).__module__])
    classes = [
        cls for cls in family.values() if inspect.isclass(cls) and (issubclass(cls, nn.Module) or is_dataclass(cls))
    ]
    names = {
        name
        for cls in classes
        for name, at in inspect.signature(cls).parameters.items()
        if at.kind in (at.POSITIONAL_OR_KEYWORD, at.KEYWORD_ONLY)
    }
    return frozenset(names | set(BUILT)) - {*LOADERS, *OURS}
