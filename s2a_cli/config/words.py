"""The words of a command line that compose a config: how to do a run again."""

from __future__ import annotations

import shlex

from omegaconf import DictConfig

from s2a_cli.common.errors import UserError
from s2a_cli.config.compose import compose
from s2a_cli.config.overrides import groups, value_text
from s2a_cli.config.settings import leaves

GROUPS = ("backbone", "method", "quant", "dataset", "optim")
FREE = {"backbone": "timm"}  # the option of a group whose name can be any
LEFT_OUT = ("run_dir",)


def words_of(config: DictConfig) -> list[str] | None:
    """Returns words that compose this config, its run_dir apart: options of groups, and what differs from these.

    Returns None where no words do, as for a config whose options this version does not have.
    """
    known, words = groups(), []
    for group in GROUPS:
        if group == "quant" and config.budget:  # which chooses it
            continue
        name = config[group].name
        parts = name.split("+") if group == "method" else [name]
        if group in FREE and name not in known[group]:
            parts = [FREE[group]]
        if not all(part in known[group] for part in parts):
            return None
        words.append(f"{group}={parts[0] if len(parts) == 1 else value_text(parts)}")
        if parts != name.split("+"):
            words.append(f"{group}.name={value_text(name)}")
    wanted = {key: value for key, value in leaves(config) if key not in LEFT_OUT}
    try:
        for _ in range(2):  # a setting that another one follows, such as optim.lr, may change with the latter
            now = dict(leaves(compose(words)))
            words += [f"{key}={value_text(value)}" for key, value in wanted.items() if now.get(key) != value]
        now = dict(leaves(compose(words)))
    except UserError:
        return None
    return words if all(now.get(key) == value for key, value in wanted.items()) else None


def command(words: list[str]) -> str:
    """Returns a command line of a shell that trains with these words."""
    return shlex.join(["s2a", "train", *words])
