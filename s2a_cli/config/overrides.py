"""Reads the words of a command line, `key=value` in Hydra's grammar, and expands words of several values to a grid.

A word can name huge numbers, endless ranges and references that multiply each other. All bounds on them are here.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import brief, first_line, nearest, utf8

PACKAGE = Path(__file__).parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # a wheel, or a checkout

LONGEST = 10_000  # characters of a word; Hydra's parser takes a second for so many brackets
LONGEST_KEY = 200
LARGEST = 2**63  # no integer of a setting reaches it
MOST_REFERENCES = 16  # ${...} in all words together: thirty, each of two others, would make a text of a billion letters
MOST_RUNS = 10_000  # of a grid
LISTED = 20  # options that an error lists by name
# Texts that need no quotes, neither for Hydra nor in YAML.
PLAIN = re.compile(r"(\.{0,2}/)*[A-Za-z_]([\w./:+-]*[\w./+-])?|\d+(\.\d+)?[MG]iB", re.ASCII)
TOKEN = r"[^\s,()\[\]{}'\"$\\]+"  # what can stand without quotes in a setting that is a text
TAKEN = ("null", "true", "false", "nan", "inf", "yes", "no", "on", "off")  # apart from these


def offered(group: str, names: Sequence[str]) -> str:
    """Returns the options of a config group for an error; many of them as the command that lists them."""
    return ", ".join(names) if len(names) <= LISTED else f"the {len(names)} that `s2a ls {group}s` lists"


def groups(conf: Path = CONF) -> dict[str, list[str]]:
    """Returns {group: its options}, as there are files in `conf/`."""
    folders = sorted(folder for folder in conf.iterdir() if folder.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("[!_]*.yaml")) for folder in folders}


def read(word: str) -> Any:
    """Returns Hydra's reading of `key=value`.

    Raises UserError for what Hydra can't read and for values that no setting can have.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if len(word) > LONGEST:
        raise UserError(f"{brief(word)}: has {len(word):,} characters; at most {LONGEST:,} are read")
    if len(key := word.partition("=")[0]) > LONGEST_KEY:
        raise UserError(f"{brief(key)}: no such setting; the longest name has less than {LONGEST_KEY} characters")
    if not word.isprintable() and (shown := utf8(word)) != word:
        raise UserError(f"{brief(shown)}: is no text in UTF-8")
    try:
        override = OverridesParser.create().parse_override(_with_texts(word))
        value = override.value()
    except Exception as error:  # the grammar's functions, such as int() and range(), raise what they like
        quoting = "write key=value, and quote special characters: 'key=\"a (b)\"'"
        raise UserError(f"{brief(word)}: can't be read ({first_line(error, 100)}); {quoting}") from None
    numbers = [leaf for leaf in leaves_of(value) if type(leaf) in (int, float)]
    if any(isinstance(number, int) and abs(number) >= LARGEST for number in numbers):
        raise UserError(f"{brief(word)}: an integer here is below 2^63")
    if numbers and (odd := next(_underscored(word.partition("=")[2]), None)):
        joined = odd.replace("_", "")
        raise UserError(
            f"{brief(word)}: {odd} could mean the number {joined} or a text; write {joined}, or '{key}=\"{odd}\"'"
        )
    return override


def _with_texts(word: str) -> str:
    """Returns a word in which the values of a setting that is a text are one: 1e3 means no number, true no truth."""
    key, _, value = word.partition("=")
    found = re.fullmatch(rf"(\[?)({TOKEN}(?:,{TOKEN})*)(\]?)", value) if key.lstrip("+") in _text_settings() else None
    if not found:
        return word
    texts = [one if one.lower() == "null" else value_text(one) for one in found[2].split(",")]
    return f"{key}={found[1]}{','.join(texts)}{found[3]}"


@functools.cache
def _text_settings() -> set[str]:
    """Returns the keys of the settings that are texts, or lists of some."""
    from s2a_cli.config.schema import RunConfig, SweepConfig
    from s2a_cli.config.settings import members, walk

    found = [*walk(RunConfig), *walk(SweepConfig, "sweep.")]
    return {key for key, schema, name in found if {*members(schema, name)} <= {str, list[str], type(None)}}


def words_of_file(path: Path) -> list[str]:
    """Returns the words that a file of `key: value` in YAML stands for: keys as on the command line.

    Values are those of YAML; a setting that is a text takes what was typed, such as 1e3. Raises UserError for a file
    that can't be read, and for one that is none of these.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    for kind in ("int", "float", "bool", "timestamp"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", lambda loader, node: node.value)
    try:
        text = path.read_text(encoding="utf-8")
        found, typed = yaml.safe_load(text), yaml.load(text, Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UserError(f"config={path}: can't be read ({why})") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"config={path}: expected lines of `key: value`, with keys as on the command line")
    both = zip(found.items(), typed.values())
    return [f"{key}={value_text(as_typed if key in _text_settings() else value)}" for (key, value), as_typed in both]


def value_text(value: Any) -> str:
    """Returns a value as it is written behind a key on the command line, which is YAML as well."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(value_text, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{value_text(key)}: {value_text(one)}" for key, one in value.items()) + "}"
    if not isinstance(value, str):
        return repr(value) if isinstance(value, int | float) else str(value)
    if PLAIN.fullmatch(value) and value.lower() not in TAKEN:
        return value
    quote = "'" if "\\" in value and "'" not in value else '"'  # in double ones YAML has other rules for backslashes
    escaped = re.sub(rf"(\\*){quote}", rf"\1\1\\{quote}", value)
    return quote + re.sub(r"(\\+)\Z", r"\1\1", escaped) + quote


def leaves_of(value: Any) -> Iterator[Any]:
    """Yields the single values in a value that Hydra read: of lists, dicts, choices, ranges and intervals."""
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep

    if isinstance(value, dict):
        value = [*value, *value.values()]
    elif isinstance(value, ChoiceSweep):
        value = value.list
    elif isinstance(value, RangeSweep):
        value = [value.start, value.stop, value.step]
    elif isinstance(value, IntervalSweep):
        value = [value.start, value.end]
    if isinstance(value, list):
        for inner in value:
            yield from leaves_of(inner)
    else:
        yield value


def _underscored(text: str) -> Iterator[str]:
    """Yields what stands unquoted in a value and is a number to Hydra, as `1_0` is."""
    unquoted = re.sub(r"'(\\.|[^'\\])*'|\"(\\.|[^\"\\])*\"", "", text)
    for token in re.split(r"[\s,:()\[\]{}=]+", unquoted):
        if "_" in token and re.fullmatch(r"[-+]?[\d_]*\.?[\d_]+(e[-+]?[\d_]+)?|[-+]?[\d_]+\.", token, re.IGNORECASE):
            yield token


def refuse_explosions(words: Iterable[str]) -> None:
    """Raises UserError for more references in the words than any use of them needs: they can multiply each other."""
    found = sum(word.count("${") for word in words)
    if found > MOST_REFERENCES:
        raise UserError(
            f"these words refer to others {found} times (${{...}}); at most {MOST_REFERENCES} times are followed"
        )


def parsed(word: str) -> Any | None:
    """Returns Hydra's reading of a word; None where it can't be read, which `compose` explains better."""
    try:
        return read(word) if "=" in word else None
    except UserError:
        return None


def expand(words: list[str]) -> list[list[str]]:
    """Returns the words of each member of a grid, in the order of nested loops: the first word varies slowest.

    choice(), range(), sort(), shuffle(), `a,b` and, for config groups, glob() have several values. Raises UserError for
    a glob that matches nothing, for more than MOST_RUNS members, and for interval(), which is for a search.
    """
    values = [_values(word) for word in words]
    if (runs := math.prod(map(len, values))) > MOST_RUNS:
        raise UserError(f"these words stand for {runs:,} runs; a grid has at most {MOST_RUNS:,}: make several of it")
    return [list(member) for member in itertools.product(*values)]


def _values(word: str) -> list[str]:
    """Returns a word for each value of one of several values, and the word itself for any other."""
    from hydra.core.override_parser.types import Glob, RangeSweep

    override = parsed(word)
    if override is None or not override.is_sweep_override():
        return [word]
    key, value = override.key_or_group, override.value()
    if isinstance(value, Glob):
        known = groups(CONF).get(key)
        if known is None:
            raise UserError(
                f"{brief(word)}: glob() is for {', '.join(groups(CONF))}; give the values of {key}, separated by commas"
            )
        found = value.filter(known)
        if not found:
            raise UserError(
                f"{brief(word)}: matches nothing; there are {offered(key, known)}{nearest(value.include[0], known)}"
            )
    elif not override.is_discrete_sweep():
        raise UserError(f"{brief(word)}: an interval has no end of values; give some, or use it with s2a search")
    else:
        if isinstance(value, RangeSweep) and (count := steps(word, value)) > MOST_RUNS:
            raise UserError(f"{brief(word)}: has {count:,} values; a grid has at most {MOST_RUNS:,} runs")
        found = list(override.sweep_string_iterator())
    if not found:
        raise UserError(f"{brief(word)}: no values; range(0,3) means 0,1,2")
    return [f"{override.get_key_element()}={one}" for one in dict.fromkeys(found)]


def steps(word: str, span: Any) -> int:
    """Returns how many values a range() has. Raises UserError for one that has no end, or no step."""
    numbers = span.start, span.stop, span.step
    if not all(map(math.isfinite, numbers)) or not span.step:
        raise UserError(f"{brief(word)}: expected range(START,STOP,STEP) of finite numbers, with a step other than 0")
    return max(0, math.ceil(min((span.stop - span.start) / span.step, LARGEST)))
