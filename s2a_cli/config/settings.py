"""A setting: its default, its line in the help and the rule for its values, at the one place where it is declared."""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from s2a_cli.config.rules import Rule


def setting(default: Any = MISSING, *, help: str, rule: Rule | None = None) -> Any:
    """Declares a field of a config dataclass.

    default: a value, or a function without arguments that makes one; without it the setting has to be given.
    help: the line that `s2a train --help` shows. rule: what is accepted beside the field's type.
    """
    metadata = {"help": help, "rule": rule}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    if isinstance(default, Callable):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def help_of(schema: type, name: str) -> str:
    """The help of a setting; empty for one that was declared without."""
    return _metadata(schema, name).get("help", "")


def rule_of(schema: type, name: str) -> Rule | None:
    """The rule of a setting; None where its type says all."""
    return _metadata(schema, name).get("rule")


def default_of(schema: type, name: str) -> Any:
    """The default of a setting; None where a function makes it, or it has none."""
    default = next((field.default for field in dataclasses.fields(schema) if field.name == name), None)
    return None if default is dataclasses.MISSING else default


def members(schema: type, name: str) -> tuple[Any, ...]:
    """The types that a setting takes: (int, NoneType) for `int | None`."""
    hint = typing.get_type_hints(schema)[name]
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def walk(schema: type, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """(dotted key, the dataclass that declares it, its name there) of every setting below a dataclass."""
    for field in dataclasses.fields(schema):
        node = next(
            (kind for kind in members(schema, field.name) if isinstance(kind, type) and dataclasses.is_dataclass(kind)),
            None,
        )
        if node is None:
            yield prefix + field.name, schema, field.name
        else:
            yield from walk(node, f"{prefix}{field.name}.")


def plain(config: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """Returns the settings as plain Python."""
    return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=resolve))


def merged(config: DictConfig, changes: dict[str, Any]) -> DictConfig:
    """Returns the settings with some of them changed."""
    return cast(DictConfig, OmegaConf.merge(config, changes))


def leaves(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting, null for one without a value; lists and `kwargs` as plain Python."""
    for key, _, _, value in declared(config, prefix):
        yield key, value


def declared(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, type, str, Any]]:
    """(dotted key, the dataclass that declares it, its name there, value) of every setting of a typed config."""
    for name in config:
        try:
            value = None if OmegaConf.is_missing(config, name) else config[name]
        except (OmegaConfBaseException, ArithmeticError, ValueError, TypeError, RecursionError):
            value = None  # a reference to a setting without a value, which is told under its own key
        if isinstance(value, DictConfig) and OmegaConf.get_type(value) is not dict:
            yield from declared(value, f"{prefix}{name}.")
        else:
            value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            yield f"{prefix}{name}", cast(type, OmegaConf.get_type(config)), str(name), value


def missing(config: DictConfig) -> set[str]:
    """The dotted keys of the settings that have to be given and were not."""
    return {key for key, value in _flat(plain(config, resolve=False)) if value == "???"}


def _flat(settings: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _metadata(schema: type, name: str) -> typing.Mapping[str, Any]:
    return next((field.metadata for field in dataclasses.fields(schema) if field.name == name), {})
