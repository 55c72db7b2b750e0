"""Settings have one home: YAML files hold what differs from the schema's defaults, and each setting has its help."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from s2a_cli.config.overrides import CONF
from s2a_cli.config.schema import (
    BackboneConfig,
    DatasetConfig,
    MethodConfig,
    OptimConfig,
    QuantConfig,
    RunConfig,
    SweepConfig,
)
from s2a_cli.config.settings import help_of, plain, walk
from s2a_cli.config.structures import STRUCTURES

GROUPS = {"backbone": BackboneConfig, "quant": QuantConfig, "dataset": DatasetConfig, "optim": OptimConfig}
SCHEMAS = {
    "": [RunConfig],
    **{group: [schema] for group, schema in GROUPS.items()},
    "method": [MethodConfig, *STRUCTURES.values()],
}
FILES = sorted(file for group in SCHEMAS for file in (CONF / group).glob("*.yaml"))
LONGEST_HELP = 130  # characters


def defaults_of(file):
    """Returns the defaults of the settings that a file of `conf/` can hold."""
    if file.parent.name != "method":
        schemas = SCHEMAS["" if file.parent == CONF else file.parent.name]
    else:
        schemas = [MethodConfig, STRUCTURES[file.stem]] if file.stem in STRUCTURES else [MethodConfig]
    found = {}
    for schema in schemas:
        found |= plain(OmegaConf.structured(schema))
    return {key: value for key, value in found.items() if value != "???"}


def test_there_are_files_of_every_group():
    assert {file.parent.name for file in FILES} == {CONF.name, *GROUPS, "method"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_file_holds_only_what_differs_from_the_defaults(file):
    stated = plain(OmegaConf.load(file))
    stated.pop("defaults", None)
    for key, value in stated.items():
        without = {name: other for name, other in stated.items() if name != key}
        by_default = OmegaConf.create(defaults_of(file) | without)  # a default may refer to another setting
        assert key == "name" or key not in by_default or value != by_default[key], key


def test_a_value_that_restates_a_default_is_found(tmp_path):
    (tmp_path / "quant").mkdir()
    file = tmp_path / "quant" / "odd.yaml"
    file.write_text("name: odd\nbits: 4\nattention: 4\n")
    with pytest.raises(AssertionError, match="attention"):
        test_a_file_holds_only_what_differs_from_the_defaults(file)


def settings():
    """Yields (key, the dataclass that declares it, its name there) of every setting of runs, sweeps and structures."""
    yield from (one for one in walk(RunConfig) if one[0] != "method")
    yield from walk(MethodConfig, "method.")
    yield from walk(SweepConfig, "sweep.")
    for name, schema in STRUCTURES.items():
        yield from walk(schema, f"method={name} method.")


@pytest.mark.parametrize(
    ("key", "schema", "name"), list(settings()), ids=lambda part: part if isinstance(part, str) else ""
)
def test_help_is_a_fragment_on_one_line(key, schema, name):
    text = help_of(schema, name)
    assert text and text == " ".join(text.split()), "there is help, on one line"
    assert len(text) <= LONGEST_HELP
    assert text.endswith("...") or not text.endswith("."), "a fragment has no period"
