"""A setting: its default, its line in the help and the rule for its values, at the one place where it is declared."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from s2a_cli.config.rules import Rule


def setting(default: Any = MISSING, *, help: str, rule: Rule | None = None) -> Any:
    """Declares a field of a config dataclass.

    default: a value, or a function without arguments that makes one; without it the setting has to be given.
    help: the line that `s2a train --help` shows.
    rule: what is accepted, where the field's type does not say all.
    """
    metadata = {"help": help, "rule": rule}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def help_of(schema: type, name: str) -> str:
    """Returns the help of a setting; empty for one that was declared without."""
    return _metadata(schema, name).get("help", "")


def rule_of(schema: type, name: str) -> Rule | None:
    """Returns the rule of a setting; None where its type says all."""
    return _metadata(schema, name).get("rule")


def default_of(schema: type, name: str) -> Any:
    """Returns the default of a setting; None where a function makes it, or it has none."""
    default = next((field.default for field in dataclasses.fields(schema) if field.name == name), None)
    return None if default is dataclasses.MISSING else default


@functools.cache
def members(schema: type, name: str) -> tuple[Any, ...]:
    """Returns the types that a setting takes: (int, NoneType) for `int | None`."""
    hint = typing.get_type_hints(schema)[name]
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def node_of(types: Iterable[Any]) -> type | None:
    """Returns the dataclass among the types of a setting, which then holds settings of its own; None without one."""
    return next(filter(dataclasses.is_dataclass, types), None)


def walk(schema: type, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """Yields (dotted key, the dataclass that declares it, its name there) of every setting below a dataclass."""
    for field in dataclasses.fields(schema):
        node = node_of(members(schema, field.name))
        if node is None:
            yield prefix + field.name, schema, field.name
        else:
            yield from walk(node, f"{prefix}{field.name}.")


def leaves(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of every setting of a typed config.

    A setting without a value has None. Lists and dicts come as plain Python.
    """
    for key, _, _, value in declared(config, prefix):
        yield key, value


def declared(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, type, str, Any]]:
    """Yields (dotted key, the dataclass that declares it, its name there, value) of every setting of a typed config."""
    schema = schema_of(config)
    for name in config:
        try:
            value = None if OmegaConf.is_missing(config, name) else config[name]
        except (OmegaConfBaseException, ArithmeticError, ValueError, TypeError, RecursionError):
            value = None  # it refers to a setting without a value, which is reported under its own key
        if isinstance(value, DictConfig) and OmegaConf.get_type(value) is not dict:
            yield from declared(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", schema, str(name), plain(value) if OmegaConf.is_config(value) else value


def with_defaults(schema: type) -> DictConfig:
    """Returns the typed config of a dataclass, with its defaults."""
    return copy.deepcopy(_typed(schema))  # a sixth of the time that making it takes


@functools.cache
def _typed(schema: type) -> DictConfig:
    return OmegaConf.structured(schema)


def missing(config: DictConfig) -> set[str]:
    """Returns the dotted keys of the settings that have to be given and were not."""
    return {key for key, value in _flat(plain(config)) if value == "???"}


def plain(config: Any, *, resolve: bool = False) -> Any:
    """Returns a config as plain dicts, lists and values; references stay as they are written unless resolved."""
    return OmegaConf.to_container(config, resolve=resolve)


def merge(*configs: Any) -> DictConfig:
    """Returns dicts or configs of settings merged into one config; the later ones win."""
    return cast(DictConfig, OmegaConf.merge(*configs))


def replaced(config: DictConfig, settings: Mapping[str, Any]) -> DictConfig:
    """Returns a copy of a typed config with other values at dotted keys.

    A dict takes the place of all settings of a key that has some of its own.
    """
    copied = merge(config)
    for key, value in settings.items():
        node = OmegaConf.select(copied, key)
        if isinstance(node, DictConfig) and dataclasses.is_dataclass(schema := schema_of(node)):
            value = OmegaConf.structured(schema(**value))
        OmegaConf.update(copied, key, value, merge=False)
    return copied


def schema_of(config: Any) -> type:
    """Returns the dataclass of a typed config, or dict for one without."""
    return OmegaConf.get_type(config) or dict


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of nested dicts."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _metadata(schema: type, name: str) -> Mapping[str, Any]:
    """Returns what `setting` stored beside a field; empty for a field that was declared without."""
    return next((field.metadata for field in dataclasses.fields(schema) if field.name == name), {})
