"""The command line: `s2a COMMAND key=value ...`: flags, help and errors. The commands are in commands.py."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

from s2a_cli import __version__
from s2a_cli.cli.commands import COMMANDS, Command, composed, first_of_grid
from s2a_cli.common import streams
from s2a_cli.common.errors import RunError, UserError
from s2a_cli.common.text import brief, nearest, printable

FLAGS = {  # flag -> its value and meaning
    "--help": ("", "this, or the help of a command"),
    "--cfg": ("job", "print the composed config and stop"),
    "--debug": ("", "show the traceback of an error"),
    "--version": ("", "versions of s2a and of what it stands on"),
    "--completion": ("bash|zsh|fish", 'print shell completion: eval "$(s2a --completion bash)"; fish: ... | source'),
    "--complete": ("", ""),  # what the shells call
}
TRAINING = ("train", "sweep", "search")  # commands that do all their work, even where its output can't be printed


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0: done. 1: a run failed. 2: bad input. 75: busy. 130: Ctrl-C or `kill`. 141: a closed pipe.
    """
    as_command, argv = argv is None, sys.argv[1:] if argv is None else argv
    if as_command and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left half-written
    streams.opened()
    command = next((word for word in argv if not word.startswith("-")), "")
    with streams.unfailing() if command in TRAINING else contextlib.nullcontext():
        code = _run(argv)
        if as_command and "torch" in sys.modules:
            _leave(code)
        return code


def _run(argv: list[str]) -> int:
    """Runs one command and turns what it raises into a line on stderr and an exit code."""
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `s2a ls | head -1`; Python flushes stdout once more at exit
        streams.nowhere(sys.stdout)
        return 141
    except KeyboardInterrupt:
        print("s2a: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in argv:
            raise
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # a name that the user gave, or a table
            error = UserError(f"{brief(str(error.filename))}: is too long for the name of a file")
        lines = [printable(line) for line in str(error).strip().splitlines()] or [""]
        if isinstance(error, UserError) and len(lines) > 1:
            print(f"s2a: {len(lines)} problems:", *lines, sep="\n  ", file=sys.stderr)
        elif isinstance(error, UserError | RunError):
            print(f"s2a: {lines[0]}", file=sys.stderr)
        else:
            print(f"s2a: {type(error).__name__}: {lines[0]} (--debug shows the traceback)", file=sys.stderr)
        return error.code if isinstance(error, UserError) else 1


def _leave(code: int) -> None:
    """Ends the process at once: to take down torch's modules, one by one, costs a second and does nothing else."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _dispatch(argv: list[str]) -> int:
    """Does what the flags ask for, or runs the command. Raises UserError for words that say neither."""
    flags, words = _split(argv)
    if files := [word for word in words if word.startswith("config=")]:
        words = _with_files(words, files)
    words = [_at_home(word) for word in words]
    own_flags = COMMANDS[words[0]].flags if words and words[0] in COMMANDS else {}
    for name in flags.keys() - FLAGS.keys() - own_flags.keys():
        accepted = [*(flag for flag, (_, about) in FLAGS.items() if about), *own_flags]
        raise UserError(f"{name}: no such flag; accepted: {', '.join(accepted)}{nearest(name, accepted)}")
    if "--complete" in flags:
        from s2a_cli.cli.completion import complete

        print(*complete(os.environ.get("COMP_LINE", "")), sep="\n")
    elif "--completion" in flags:
        from s2a_cli.cli.completion import script

        print(script(flags["--completion"]))
    elif "--version" in flags:
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "hydra-core"))
        print(f"s2a {__version__} ({packages}, Python {sys.version.split()[0]})")
    elif not words:
        print(_help())
    elif words[0] not in COMMANDS:
        raise UserError(f"{words[0]}: no such command; accepted: {', '.join(COMMANDS)}{nearest(words[0], COMMANDS)}")
    elif "--help" in flags:
        _command_help(COMMANDS[words[0]], words[1:])
    elif "--cfg" in flags:
        command = COMMANDS[words[0]]
        if command.config is None or flags["--cfg"] != "job":
            having = ", ".join(name for name, command in COMMANDS.items() if command.config)
            raise UserError(f"--cfg: expected --cfg job behind one of {having}")
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(command.config(words[1:])), end="")
    else:
        return COMMANDS[words[0]].run([*words[1:], *(name for name in flags if name in own_flags)])
    return 0


def _with_files(words: list[str], files: list[str]) -> list[str]:
    """Returns the words with those of the files behind config= in front, so that the others change them."""
    from s2a_cli.config.overrides import words_of_file

    read = [one for word in files for one in words_of_file(Path(word.removeprefix("config=")))]
    return [words[0], *read, *(word for word in words[1:] if word not in files)]


def _at_home(word: str) -> str:
    """Returns `key=~/path` with the home folder in place of ~, which shells leave as it is behind a key."""
    key, equals, value = word.partition("=")
    return key + equals + os.path.expanduser(value) if value == "~" or value.startswith("~/") else word


def _split(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Splits a command line into its flags, wherever they stand, and the other words."""
    flags: dict[str, str] = {}
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, _, value = word.partition("=")
        name = "--help" if name == "-h" else name
        if not word.startswith("-"):
            words.append(word)
        elif FLAGS.get(name, ("",))[0] and not value:
            if not rest:
                raise UserError(f"{name}: expected {name} {FLAGS[name][0]}")
            flags[name] = rest.pop(0)
        elif "=" in word and not FLAGS.get(name, ("",))[0]:
            raise UserError(f"{word}: {name} takes no value; it is {name} or nothing")
        else:
            flags[name] = value
    return flags, words


def _help() -> str:
    """Returns the help of `s2a` itself."""
    commands = [f"  {name:<10} {command.about}" for name, command in COMMANDS.items()]
    flags = [f"  {f'{flag} {value}':<27} {about}" for flag, (value, about) in FLAGS.items() if about]
    return "\n".join(
        [
            f"s2a {__version__}: fine-tune pretrained vision backbones in little memory",
            "",
            "  s2a COMMAND [key=value ...]     s2a COMMAND --help shows examples and every key",
            "",
            *commands,
            "",
            *flags,
        ]
    )


def _command_help(command: Command, words: list[str]) -> None:
    """Prints the examples of a command and, where it has a config, every key with its default.

    The defaults are those that the config has when it is composed with `words`.
    """
    print(*command.examples, "", f"{command.usage}: {command.about}", sep="\n", flush=True)
    if command.flags:
        print("", *(f"  {flag:<16} {about}" for flag, about in command.flags.items()), sep="\n")
    from omegaconf import OmegaConf

    from s2a_cli.config.overrides import groups
    from s2a_cli.config.rules import show
    from s2a_cli.config.schema import SweepConfig
    from s2a_cli.config.settings import declared, help_of

    if command.config is first_of_grid:
        print("\nSettings of the sweep; all others, with several values, are those of s2a train --help:")
        for key, schema, name, value in declared(OmegaConf.structured(SweepConfig), "sweep."):
            print(f"  {f'{key}={show(value)}':<28} {help_of(schema, name)}")
    if command.config is not composed:
        return

    print("\nGroups (s2a ls tells more):")
    for group, options in groups().items():
        print(f"  {f'{group}=':<13} {', '.join(options)}")
    config = composed(words)
    chosen = " ".join(f"{group}={config[group].name}" for group in ("backbone", "method", "quant", "dataset", "optim"))
    print(f"\nSettings, with the values that they have under {chosen}:")
    for key, schema, name, value in declared(config):
        print(f"  {f'{key}={show(value)}':<42} {help_of(schema, name)}".rstrip())
