"""Turns the words of a command line into one typed, resolved and checked config, or reports all that is wrong.

Hydra composes the files of `conf/`; it accepts any key behind `+` and stops at its first error. So values are set as
`++key=value` sets them, whatever the key, and the schema in schema.py judges keys, types and values afterwards.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, InterpolationToMissingValueError

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import brief, first_line, nearest
from s2a_cli.config.checks import check
from s2a_cli.config.loading import UNFIT, Problems, load
from s2a_cli.config.overrides import CONF, groups, offered, read, refuse_explosions
from s2a_cli.config.rules import Rule, show
from s2a_cli.config.schema import GONE, OLDER_VALUES, MethodConfig, RunConfig, SweepConfig
from s2a_cli.config.settings import (
    declared,
    default_of,
    leaves,
    members,
    merge,
    missing,
    node_of,
    plain,
    rule_of,
    schema_of,
    with_defaults,
)
from s2a_cli.config.structures import STRUCTURES
from s2a_cli.config.trust import check_kwargs, check_stored

OmegaConf.register_new_resolver("times", lambda *factors: math.prod(map(float, factors)), replace=True)


def compose(overrides: list[str], config_dir: Path | None = None) -> DictConfig:
    """Returns the config of one run, resolved and typed: a RunConfig whose `method` is the method's own config.

    overrides: words such as "method=bias" and "optim.lr=1e-3". config_dir: a folder in the place of `conf/`.
    Raises UserError with one line for each problem.
    """
    conf = Path(config_dir or CONF).resolve()
    problems: Problems = {}
    words = _readable(overrides, conf, problems)
    if "experiment" in problems:  # whatever else is said about a config without it would be guesswork
        raise UserError("\n".join(problems.values()))
    for word in words:
        if word.lstrip("+").startswith("sweep"):
            problems[word] = f"{word.lstrip('+')}: a setting of s2a sweep; this is one run"
    loaded = load(words, conf, problems)
    loaded.pop("sweep", None)  # what an experiment brings along for a sweep
    if loaded.get("budget") is not None:
        problems |= _planned(words)
    return _judged(loaded, problems)


def compose_sweep(overrides: list[str]) -> SweepConfig:
    """Returns how to go through a grid, from the words and the experiment named in them.

    Raises UserError as `compose` does.
    """
    problems: Problems = {}
    loaded = load(_readable(overrides, CONF, problems), CONF, problems)
    typed = with_defaults(SweepConfig)
    _fit(loaded.get("sweep") or OmegaConf.create(), typed, "sweep.", problems)
    for key, schema, name, value in declared(typed, "sweep."):
        rule = rule_of(schema, name)
        if rule and value is not None and not rule.test(value):
            problems[key] = rule.problem(key, value, optional=True)
    if problems:
        raise UserError("\n".join(problems.values()))
    return cast(SweepConfig, OmegaConf.to_object(typed))


def recompose(stored: dict[str, Any], overrides: list[str]) -> DictConfig:
    """Returns the config of a finished run, with changes.

    stored: what the run's record says. Somebody else may have written it, so it is read as values alone, and a data
    set is downloaded to no folder that it names. Raises UserError as `compose` does.
    """
    check_stored(stored)
    refuse_explosions(overrides)
    problems: Problems = {}
    loaded = OmegaConf.create(stored)
    for group, _, name in (key.partition(".") for key in GONE):
        if isinstance(loaded.get(group), DictConfig):
            loaded[group].pop(name, None)
    dataset = loaded.get("dataset")
    if isinstance(dataset, DictConfig) and dataset.get("root"):
        dataset.download = False
    known = groups()
    for override in _parsed(overrides, known, problems):
        key = override.key_or_group
        if key in known:
            problems[key] = f"{override.input_line}: a finished run keeps its {key}"
        else:
            try:
                OmegaConf.update(loaded, key, override.value(), force_add=True)
                if key == "dataset.root" and not any(
                    word.lstrip("+").startswith("dataset.download=") for word in overrides
                ):
                    loaded.dataset.download = True
            except UNFIT as error:
                problems[key] = f"{brief(override.input_line)}: can't be set ({first_line(error)})"
    return _judged(loaded, problems)


def compose_method(names: Sequence[str], settings: Mapping[str, Any]) -> DictConfig:
    """Returns the config of a method that is made of these structures, with its settings as Python values.

    Settings of one structure among several stand under its name: {"side": {"heads": 2}}. Raises UserError as `compose`
    does.
    """
    problems: Problems = {}
    words = _readable([f"method=[{','.join(map(str, names))}]"], CONF, problems)
    if problems:
        raise UserError("\n".join(problems.values()))
    loaded = load(words, CONF, problems)
    try:
        loaded.method = merge(loaded.method, settings)
    except UNFIT as error:
        raise UserError(f"method: can't be set ({first_line(error)})") from None
    return _judged(loaded, problems).method


def composable(overrides: list[str]) -> list[str]:
    """Returns those of the words that Hydra can compose, in a form in which it refuses none: for completion."""
    return _readable(overrides, CONF, {})


def _parsed(overrides: list[str], known: dict[str, list[str]], problems: Problems) -> list[Any]:
    """Returns Hydra's reading of the words, without those that set nothing or name several values.

    What is wrong with those is added to `problems`.
    """
    parsed = []
    for word in overrides:
        if word.startswith("~"):
            problems[word] = f"{brief(word)}: nothing can be deleted; leave it out, or set it to null"
            continue
        if "=" not in word:
            hint = next((f" (did you mean {group}={word}?)" for group, options in known.items() if word in options), "")
            problems[word] = f"{brief(word)}: expected key=value{hint}"
            continue
        try:
            override = read(word)
        except UserError as error:
            problems[word] = str(error)
            continue
        if not override.key_or_group or override.package is not None:
            problems[word] = f"{brief(word)}: expected key=value"
        elif override.is_sweep_override():
            problems[word] = f"{brief(word)}: one value is expected here; quote a text with commas: 'key=\"a,b\"'"
        elif override.key_or_group.split(".")[0] == "hydra":
            problems[word] = f"{word}: Hydra's own settings are not used here"
        else:
            parsed.append(override)
    return parsed


def _readable(overrides: list[str], conf: Path, problems: Problems) -> list[str]:
    """Returns the words that Hydra can compose, in a form in which it refuses none of them.

    What is wrong with the others is added to `problems`.
    """
    refuse_explosions(overrides)
    known, words = groups(conf), []
    for override in _parsed(overrides, known, problems):
        group, value, word = override.key_or_group, override.value(), override.input_line.lstrip("+")
        if group in GONE or word in GONE:
            problems["quant"] = f"{brief(word)}: is budget=SIZE now, such as budget=900MiB fidelity=0.999"
            continue
        if group == "method" and isinstance(value, list) and len(value) == 1:
            value, word = value[0], f"method={value[0]}"
        if group not in known or isinstance(value, dict):
            words.append(f"++{word}")
        elif isinstance(value, list) and value and group == "method" and set(map(str, value)) <= set(known[group]):
            if twice := next((one for one in value if value.count(one) > 1), None):
                problems[group] = f"{override.input_line}: names {twice} twice"
            else:
                words.append(word)
        elif not isinstance(value, list) and value in known[group]:
            words.append(word)
        elif group != "experiment" or value is not None:
            odd = [str(one) for one in (value if isinstance(value, list) else [value]) if one not in known[group]]
            accepted = offered(group, known[group]) + nearest(odd[0] if odd else "", known[group])
            problems[group] = f"{group}={brief(show(value))}: expected one of {accepted}"
    return words


def _planned(words: list[str]) -> Problems:
    """Returns the problems of words that set what a budget chooses."""
    found: Problems = {}
    for word in words:
        key = word.lstrip("+").partition("=")[0]
        if key == "quant" or key.startswith("quant.") or key == "optim.micro_batch":
            found[key] = f"{brief(word.lstrip('+'))}: budget= chooses it; leave it out, or set fidelity=0.999 for codes"
    return found


def _judged(loaded: DictConfig, problems: Problems) -> DictConfig:
    """Returns `loaded` as a resolved RunConfig. Raises UserError with all problems when there are any."""
    typed = with_defaults(RunConfig)
    found: Problems = {}
    for key, values in OLDER_VALUES.items():
        group, name = key.split(".")
        if isinstance(loaded.get(group), DictConfig) and (now := values.get(str(loaded[group]._get_node(name)))):
            loaded[group][name] = now
    name = _method_name(loaded)
    if name and all(one in STRUCTURES for one in name.split("+")):
        typed.method = with_defaults(method_schema(name))
    else:
        accepted = offered("method", list(STRUCTURES)) + nearest(str(name), STRUCTURES)
        found["method"] = f"method.name={brief(show(name))}: expected one of {accepted}"
    _fit(loaded, typed, "", found)
    for key in sorted(missing(typed) - found.keys() - {"method"}):
        found[key] = f"{key}: has no value; add {key}=..."
    found = check(typed) | check_kwargs(plain(typed.backbone.kwargs)) | found
    raw = plain(loaded)
    # A value that comes from another key is reported there, unless two keys are each other's source.
    found = {key: line for key, line in found.items() if _source(raw, typed, key) not in found} or found
    # A group that fell back to its default says nothing about the keys that were meant for the other option.
    wrong = tuple(f"{key}." for key in problems)
    problems |= {key: line for key, line in found.items() if key not in problems and not key.startswith(wrong)}
    if problems:
        raise UserError("\n".join(problems.values()))
    OmegaConf.resolve(typed)
    return typed


def method_schema(name: str) -> type:
    """Returns the dataclass of a method's settings: a structure's own, or those of several, each under its name."""
    return _method_schema(tuple((one, STRUCTURES[one]) for one in name.split("+")))


@functools.cache
def _method_schema(structures: tuple[tuple[str, type], ...]) -> type:
    if len(structures) == 1:
        return make_dataclass("MethodConfig", [], bases=(structures[0][1], MethodConfig))
    parts = [(name, settings, field(default_factory=settings)) for name, settings in structures]
    return make_dataclass("MethodConfig", parts, bases=(MethodConfig,))


def _method_name(loaded: DictConfig) -> Any:
    """Returns what stands under method.name; None for no text, and for a reference that leads nowhere."""
    try:
        name = loaded.method.name
    except (AttributeError, *UNFIT):
        return None
    return name if isinstance(name, str) else None


def _source(raw: dict[str, Any], typed: DictConfig, key: str) -> str | None:
    """Returns the key that this one takes its value from, as in `norm: ${.bits}`; None where it refers to none."""
    node, _, name = key.rpartition(".")
    settings: Any = raw
    for part in node.split(".") if node else ():
        settings = settings.get(part) if isinstance(settings, dict) else None
    schema = schema_of(OmegaConf.select(typed, node) if node else typed)
    value = default_of(schema, name) if is_dataclass(schema) else None
    value = settings.get(name, value) if isinstance(settings, dict) else value
    match = re.match(r"\$\{(?:times:\$\{)?([\w.]+)\}", value) if isinstance(value, str) else None
    return match[1].replace(".", f"{node}.", 1) if match and match[1][0] == "." else match and match[1]


def _fit(values: DictConfig, typed: DictConfig, prefix: str, problems: Problems) -> None:
    """Moves `values` into `typed` key by key, resolved.

    Keys and types that the schema does not have are added to `problems`.
    """
    schema = schema_of(typed)
    names = typing.get_type_hints(schema)
    for key in map(str, values):
        full = f"{prefix}{key}"
        if full in problems:
            continue
        if key not in names:
            problems[full] = _unknown(values, typed, key, prefix)
            continue
        if OmegaConf.is_missing(values, key):
            continue
        try:
            value = values[key]
        except InterpolationToMissingValueError:
            continue  # reported under the key that has no value
        except (InterpolationResolutionError, *UNFIT) as error:
            problems[full] = f"{full}: can't be resolved: {first_line(error)}"
            continue
        accepted = members(schema, key)
        node = OmegaConf.get_type(typed, key) if full == "method" else node_of(accepted)
        if node is not None:
            _fit_node(value, typed, full, node, type(None) in accepted, problems)
            continue
        try:
            value = plain(value, resolve=True) if OmegaConf.is_config(value) else value
        except UNFIT as error:
            problems[full] = f"{full}: can't be resolved: {first_line(error)}"
            continue
        try:
            if _ambiguous(value, accepted):
                raise ValueError
            OmegaConf.update(typed, key, value, merge=False)
        except UNFIT:
            rule = rule_of(schema, key) or Rule(_words(accepted), bool)
            problems[full] = rule.problem(full, value, type(None) in accepted)


def _fit_node(value: Any, typed: DictConfig, full: str, node: type, optional: bool, problems: Problems) -> None:
    """Moves the value of a key that holds settings of its own into `typed`.

    `false` or null switches an optional one off; `true` takes its defaults.
    """
    key = full.rpartition(".")[2]
    if optional and (value is None or value is False):
        typed[key] = None
    elif optional and value is True:
        typed[key] = with_defaults(node)
    elif isinstance(value, DictConfig):
        if typed[key] is None:
            typed[key] = with_defaults(node)
        _fit(value, typed[key], f"{full}.", problems)
    else:
        names = ", ".join(f"{full}.{name}" for name in typing.get_type_hints(node))
        problems[full] = (
            f"{full}={brief(show(value))}: expected its settings ({names}){', or false' if optional else ''}"
        )


def _unknown(values: DictConfig, typed: DictConfig, key: str, prefix: str) -> str:
    """Returns the line about a key that the schema does not have at this place."""
    full, inner = f"{prefix}{key}", values._get_node(key)
    while isinstance(inner, DictConfig) and len(inner) and not inner._is_interpolation():  # as far down as was written
        full, inner = f"{full}.{next(iter(inner))}", inner._get_node(next(iter(inner)))
    root = cast(DictConfig, typed._get_root())
    paths = [path for path, _ in leaves(root)]
    nodes = dict.fromkeys(path.rsplit(".", up)[0] for path in paths for up in range(1, path.count(".")))
    paths += nodes
    last = {path: path.split(".")[-1] for path in paths}
    close = difflib.get_close_matches(full.split(".")[-1], set(last.values()), n=1)  # or the right name elsewhere
    same = [path for path in paths if last[path] in close]
    same = [path for path in same if path.startswith(prefix)] or same
    hint = nearest(full, same or [*paths, *map(str, root)]) or (f" (did you mean {same[0]!r}?)" if same else "")
    where, accepted = f" in {prefix[:-1]}" if prefix else "", ", ".join(map(str, typed))
    return f"{brief(full)}: no such setting; accepted{where}: {accepted}{hint}"


def _ambiguous(value: Any, accepted: tuple[Any, ...]) -> bool:
    """Returns whether OmegaConf would take a value for something else: "1_0" for 10, 1000 for true."""
    if isinstance(value, str):
        return str not in accepted and ("_" in value or not value.isascii())
    return bool in accepted and isinstance(value, int | float) and value not in (0, 1)


def _words(types: tuple[Any, ...]) -> str:
    """Returns the types of a field in words."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    return " or ".join(names.get(m, str(m)) for m in types if m is not type(None))
