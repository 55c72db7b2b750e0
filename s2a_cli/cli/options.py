"""The words of a command that are no settings of a run, and what is said about words that are neither."""

from __future__ import annotations

from collections.abc import Sequence

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import brief, nearest

# Settings of a training that what a finished run is used for doesn't read; a name with a point begins some.
OF_TRAINING = (
    *("optim.", "quant.", "budget", "fidelity", "busy", "compile", "compile_budget", "cuda_graphs", "profile"),
    *("tensorboard", "run_dir", "save_minutes", "save_steps"),
)
READ = ("optim.batch_size", "optim.micro_batch")  # of these: how many images go through the model at a time


def options_of(words: list[str], *names: str) -> tuple[dict[str, str], list[str]]:
    """Returns the words `name=value` of these names, and the others. Raises UserError for an empty or a second one."""
    options, others = {}, []
    for word in words:
        name, equals, value = word.partition("=")
        if name not in names or not equals:
            others.append(word)
        elif not value or name in options:
            raise UserError(f"{name}=: expected once, with a value")
        else:
            options[name] = value
    return options, others


def check_keys(command: str, words: Sequence[str], own: Sequence[str], unused: tuple[str, ...] = ()) -> None:
    """Raises UserError for a key that is neither the command's own nor a setting, and for a setting without effect.

    own: names of words of the command. unused: settings that it doesn't read, as in OF_TRAINING.
    """
    from s2a_cli.config.schema import RunConfig
    from s2a_cli.config.settings import walk

    settings = ["method", *(key for key, _, _ in walk(RunConfig))]
    groups = list(dict.fromkeys(key.partition(".")[0] for key in settings))
    for word in words:
        key, equals, _ = word.lstrip("+").partition("=")
        if equals and key.partition(".")[0] not in (*groups, *own):
            taken = ", ".join(f"{name}=" for name in own)
            raise UserError(
                f"{brief(key)}: no such word; s2a {command} takes {taken} and settings of the run, such as"
                f" backbone.checkpoint=FILE{nearest(key, [*own, *groups, *settings])}"
            )
        if key not in READ and any(key == one or (one[-1] == "." and key.startswith(one)) for one in unused):
            raise UserError(f"{brief(word)}: has no effect on s2a {command}; leave it out")
