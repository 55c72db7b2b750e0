"""Has Hydra compose the files of `conf/`, once for each choice of options, and sets on top what words set."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import brief
from s2a_cli.config.overrides import CONF, read
from s2a_cli.config.settings import merge

SEVERAL = "_several"  # the option of `method` behind a list of others
Problems = dict[str, str]  # key -> one line; the first one said about a key stays
# What OmegaConf raises about a value.
UNFIT = (OmegaConfBaseException, ArithmeticError, ValueError, TypeError, RecursionError)


@contextmanager
def hydra_on(conf: Path = CONF) -> Iterator[Any]:
    """Initialises Hydra on a folder of configs and yields its config loader. Leaves a caller's own Hydra as it was."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.version import VersionBase

    callers, base = GlobalHydra.instance().hydra, VersionBase.instance().version_base
    GlobalHydra.instance().clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Hydra 1.3 warns when version_base is left out, 1.4 when it is given
            hydra = initialize_config_dir(str(conf), job_name="s2a", version_base="1.3")
        with hydra:
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra, VersionBase.instance().version_base = callers, base


def load(words: list[str], conf: Path, problems: Problems) -> DictConfig:
    """Returns what the files and the words say, not yet resolved. Raises UserError when nothing can be composed."""
    import yaml
    from hydra.errors import HydraException

    values = [word for word in words if word.startswith("++")]
    try:
        chosen, structures = _chosen(tuple(word for word in words if word not in values), conf)
        loaded = copy.deepcopy(chosen)
        for override in map(read, values):  # as Hydra sets them, which would read all files again for each of a grid
            OmegaConf.update(loaded, override.key_or_group, override.value(), merge=True, force_add=True)
    except (HydraException, yaml.YAMLError, OSError, *UNFIT) as error:
        said = " ".join(str(error).split()) + (f" ({error.__cause__})" if error.__cause__ else "")
        problems["config"] = brief(said or type(error).__name__, 400)
        raise UserError("\n".join(problems.values())) from error
    if structures:
        _join(loaded.method, structures, conf)
    return loaded


@functools.lru_cache(maxsize=256)
def _chosen(words: tuple[str, ...], conf: Path) -> tuple[DictConfig, tuple[str, ...]]:
    """Returns what Hydra composes of the files for words that choose options of groups, and the structures of a method.

    These are named where they are several. Raises what Hydra, yaml and OmegaConf raise.
    """
    structures = _named(words)
    with hydra_on(conf) as loader:
        loaded = _composed(words, structures)
        if not structures and "method" not in loaded.hydra.runtime.choices:  # an experiment's, merged into one another
            structures = _options(loader, "method", list(words))
            loaded = _composed(words, structures)
    OmegaConf.set_struct(loaded, False)
    loaded.pop("hydra")
    return loaded, tuple(structures)


def _named(words: Sequence[str]) -> list[str]:
    """Returns the structures of a method, sorted, where the words name several."""
    chosen = [word for word in words if word.lstrip("+").startswith("method=")]
    value = read(chosen[-1]).value() if chosen else None
    return sorted(map(str, value)) if isinstance(value, list) else []


def _composed(words: Sequence[str], structures: list[str]) -> DictConfig:
    """Returns what Hydra composes for the words and, where there are several, for these structures of a method."""
    from hydra import compose

    several = [f"method=[{','.join([*structures, SEVERAL])}]"] if structures else []
    return compose("config", overrides=[*words, *several], return_hydra_config=True)


def _options(loader: Any, group: str, words: list[str]) -> list[str]:
    """Returns the options of a group that Hydra composes for these words, sorted, each once."""
    from hydra.types import RunMode

    found = loader.compute_defaults_list("config", overrides=words, run_mode=RunMode.RUN).defaults
    paths = [default.config_path.split("/") for default in found if default.config_path]
    return sorted({path[-1] for path in paths if path[:-1] == [group]})


def _join(method: DictConfig, names: Sequence[str], conf: Path) -> None:
    """Makes one method of several structures, whose settings Hydra has merged: each gets its own under its name.

    Its learning rate is the lowest of theirs, unless one was given.
    """
    rates = []
    for name in names:
        own = cast(DictConfig, OmegaConf.load(conf / "method" / f"{name}.yaml"))
        rates.append(float(own.pop("lr")))
        for key in ("defaults", "name"):
            own.pop(key, None)
        for key in set(own) - set(names):
            method.pop(key, None)
        method[name] = merge(own, method.get(name) or {})
    method.name = "+".join(names)
    if method.lr is None:
        method.lr = min(rates)
