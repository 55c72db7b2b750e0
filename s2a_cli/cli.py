"""The command line: `s2a VERB key=value ...`. A verb is one entry in VERBS; only verbs that need torch import it."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from s2a_cli import __version__
from s2a_cli.errors import RunError, UserError, nearest

FLAGS = {  # flag -> its value and meaning
    "--help": ("", "this, or the help of a verb"),
    "--cfg": ("job", "print the composed config and stop"),
    "--debug": ("", "show the traceback of an error"),
    "--version": ("", "versions of s2a and of what it stands on"),
    "--completion": ("bash|zsh|fish", 'print shell completion: eval "$(s2a --completion bash)"; fish: ... | source'),
    "--complete": ("", ""),  # what the shells call
}
KINDS = {kind + "s": kind for kind in ("backbone", "method", "quant", "dataset", "experiment")}  # what `ls` lists


@dataclass(frozen=True)
class Verb:
    """`run` takes the words behind the verb and returns the exit code; `config` makes of them what `--cfg job` prints.

    `words` are completed as they stand; a verb with a config completes its settings as well.
    """

    run: Callable[[list[str]], int]
    usage: str
    about: str
    examples: tuple[str, str, str]
    words: tuple[str, ...] = ()
    config: Callable[[list[str]], Any] | None = None


def _compose(words: list[str]) -> Any:
    from s2a_cli.compose import compose

    return compose(words)


def train(words: list[str]) -> int:
    config = _compose(words)
    from s2a_cli import tables, training

    result, folder = training.train(config)
    print(tables.render(tables.table(tables.frame([result]))))
    print(f"\nrun: {folder}")
    status, error = result["status"], result["error"]
    if status != "ok":
        print(f"s2a: {status}" + (f": {error}" if error != status else ""), file=sys.stderr)
    return {"ok": 0, "interrupted": 130}.get(status, 1)


def _finished(words: list[str]) -> tuple[Path, list[str]]:
    """The folder behind `run=`, and the other words."""
    folders = [word.removeprefix("run=") for word in words if word.startswith("run=")]
    if len(folders) != 1 or not folders[0]:
        raise UserError("run=DIR is needed once: the folder of a finished run, which `s2a train` prints")
    return Path(folders[0]), [word for word in words if not word.startswith("run=")]


def _recompose(words: list[str]) -> Any:
    from s2a_cli import records

    folder, overrides = _finished(words)
    stored = records.read_result(folder)["config"]
    from s2a_cli.compose import recompose

    return recompose(stored, overrides)


def evaluate(words: list[str]) -> int:
    config = _recompose(words)
    from s2a_cli import records, training

    folder, _ = _finished(words)
    scores = training.evaluate(config, folder)
    result = records.read_result(folder)
    if result["status"] != "ok":
        print(f"the run ended as {result['status']}: there is no recorded figure to compare with")
        print(*(f"test_{name}: {value} %" for name, value in scores.items() if name != "loss" and value is not None), sep="\n")
        return 0
    recorded, equal = result["accuracy"], True
    for name in ("top1", "top5"):
        now, then = scores[name], recorded[f"test_{name}"]
        if now is not None or then is not None:
            equal &= now == then
            print(f"test_{name}: {now} %, recorded {then} %: {'equal' if now == then else 'NOT EQUAL'}")
    return 0 if equal else 1


def ls(words: list[str]) -> int:
    if odd := [word for word in words if word not in KINDS]:
        raise UserError(f"ls {odd[0]}: expected one of {', '.join(KINDS)}{nearest(odd[0], KINDS)}")
    from s2a_cli.compose import CONF, groups

    options = groups()
    for kind in words or KINDS:
        group = KINDS[kind]
        if len(words) != 1:
            print(f"{kind} ({group}=NAME)")
        for name in options.get(group, []):
            about = _docstring(name) if kind == "methods" else _comment(CONF / group / f"{name}.yaml")
            print(f"  {name:<16} {about}")
    return 0


def _comment(path: Path) -> str:
    """The leading comment lines of a config file, Hydra's own `# @package` apart."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            lines.append(line.lstrip("# "))
    return "  ".join(lines)


def _docstring(method: str) -> str:
    """The first line of a method's docstring, read without an import of torch."""
    body = ast.parse((Path(__file__).parent / "methods" / f"{method}.py").read_text(encoding="utf-8")).body
    assigned = {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in body if isinstance(node, ast.Assign)}
    found = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == assigned["METHOD"])
    return (ast.get_docstring(found) or "").split("\n")[0]


def validate(words: list[str]) -> int:
    from omegaconf import OmegaConf

    config = _compose(words)
    keys = ("optim.lr", "optim.epochs", "optim.batch_size", "precision", "seed")
    chosen = [f"{group}={config[group].name}" for group in ("backbone", "method", "quant", "dataset", "optim")]
    print("ok:", *chosen, *(f"{key}={OmegaConf.select(config, key)}" for key in keys))
    return 0


def table(words: list[str]) -> int:
    from s2a_cli import tables

    formats = [word.removeprefix("format=") for word in words if word.startswith("format=")]
    folders = [word for word in words if not word.startswith("format=")]
    if odd := [word for word in folders if "=" in word and not Path(word).exists()]:
        raise UserError(f"{odd[0]}: expected folders and format={'|'.join(tables.FORMATS)}")
    if not folders and not Path("runs").is_dir():
        raise UserError("no runs/ in this folder; name the folders that hold runs, or make a run with: s2a train")
    print(tables.render(tables.table(tables.load(folders or ["runs"])), *formats[-1:]))
    return 0


VERBS = {
    "train": Verb(
        train,
        "s2a train [key=value ...]",
        "train one run and print its table",
        (
            "s2a train",
            "s2a train backbone=vit_b method=s2a dataset=folder dataset.root=photos",
            "s2a train dataset=cifar10 backbone=vit_t method.prompt.rank=4 method.blocks=last:6 quant=int8 seed=1",
        ),
        config=_compose,
    ),
    "eval": Verb(
        evaluate,
        "s2a eval run=DIR [key=value ...]",
        "test a finished run again from its saved tensors; device, workers, dataset.root ... can change",
        (
            "s2a eval run=runs/digits/vit_micro/s2a/0123456789ab",
            "s2a eval run=runs/pets/vit_t/s2a/0123456789ab device=cpu",
            "s2a eval run=runs/pets/vit_t/s2a/0123456789ab dataset.root=/data/pets workers=2",
        ),
        words=("run=",),
        config=_recompose,
    ),
    "ls": Verb(
        ls,
        f"s2a ls [{'|'.join(KINDS)}]",
        "what there is, a line each",
        ("s2a ls", "s2a ls backbones", "s2a ls methods datasets"),
        words=tuple(KINDS),
    ),
    "validate": Verb(
        validate,
        "s2a validate [key=value ...]",
        "check a config and report all its errors; train nothing",
        (
            "s2a validate",
            "s2a validate backbone=swin_t method=bias quant.norm=8",
            "s2a validate experiment=small_gpu dataset.root=photos",
        ),
        config=_compose,
    ),
    "table": Verb(
        table,
        "s2a table [DIR ...] [format=terminal|md|csv|latex]",
        "tables of the runs below folders, runs/ by default",
        ("s2a table", "s2a table runs/pets runs/dtd format=md", "s2a table format=csv > runs.csv"),
        words=("format=terminal", "format=md", "format=csv", "format=latex"),
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 a failed run, 2 bad input, 130 Ctrl-C, 141 a closed pipe."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `s2a ls | head -1`; Python flushes stdout once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("s2a: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in argv:
            raise
        lines = str(error).strip().splitlines() or [""]
        if isinstance(error, UserError) and len(lines) > 1:
            print(f"s2a: {len(lines)} problems:", *lines, sep="\n  ", file=sys.stderr)
        elif isinstance(error, UserError | RunError):
            print(f"s2a: {lines[0]}", file=sys.stderr)
        else:
            print(f"s2a: {type(error).__name__}: {lines[0]} (--debug shows the traceback)", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def _dispatch(argv: list[str]) -> int:
    flags, words = _split(argv)
    if "--complete" in flags:
        from s2a_cli.completion import complete

        print(*complete(os.environ.get("COMP_LINE", "")), sep="\n")
    elif "--completion" in flags:
        from s2a_cli.completion import script

        print(script(flags["--completion"]))
    elif "--version" in flags:
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "hydra-core"))
        print(f"s2a {__version__} ({packages}, Python {sys.version.split()[0]})")
    elif not words:
        print(_help())
    elif words[0] not in VERBS:
        raise UserError(f"{words[0]}: no such verb; accepted: {', '.join(VERBS)}{nearest(words[0], VERBS)}")
    elif "--help" in flags:
        _verb_help(VERBS[words[0]], words[1:])
    elif "--cfg" in flags:
        verb = VERBS[words[0]]
        if verb.config is None or flags["--cfg"] != "job":
            having = ", ".join(name for name, verb in VERBS.items() if verb.config)
            raise UserError(f"--cfg: expected --cfg job behind one of {having}")
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(verb.config(words[1:])), end="")
    else:
        return VERBS[words[0]].run(words[1:])
    return 0


def _split(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Flags, wherever they stand, and the other words."""
    flags, words, rest = {}, [], list(argv)
    while rest:
        word = rest.pop(0)
        name, _, value = word.partition("=")
        name = "--help" if name == "-h" else name
        if not word.startswith("-"):
            words.append(word)
        elif name not in FLAGS:
            accepted = [flag for flag, (_, about) in FLAGS.items() if about]
            raise UserError(f"{name}: no such flag; accepted: {', '.join(accepted)}{nearest(name, accepted)}")
        elif FLAGS[name][0] and not value:
            if not rest:
                raise UserError(f"{name}: expected {name} {FLAGS[name][0]}")
            flags[name] = rest.pop(0)
        else:
            flags[name] = value
    return flags, words


def _help() -> str:
    verbs = [f"  {name:<10} {verb.about}" for name, verb in VERBS.items()]
    flags = [f"  {f'{flag} {value}':<27} {about}" for flag, (value, about) in FLAGS.items() if about]
    return "\n".join(
        [
            f"s2a {__version__}: fine-tune pretrained vision backbones in little memory",
            "",
            "  s2a VERB [key=value ...]     s2a VERB --help shows examples and every key",
            "",
            *verbs,
            "",
            *flags,
        ]
    )


def _verb_help(verb: Verb, words: list[str]) -> None:
    """Examples first; then, for a verb with a config, every key with its default, as composed with `words`."""
    print(*verb.examples, "", f"{verb.usage}: {verb.about}", sep="\n", flush=True)
    if verb.config is not _compose:
        return
    from omegaconf import OmegaConf

    from s2a_cli.compose import compose, groups
    from s2a_cli.config import leaves, meanings, show

    print("\nGroups (s2a ls tells more):")
    for group, options in groups().items():
        print(f"  {f'{group}=':<13} {', '.join(options)}")
    config = compose(words)
    chosen = " ".join(f"{group}={config[group].name}" for group in ("backbone", "method", "quant", "dataset", "optim"))
    print(f"\nSettings, with the values that they have under {chosen}:")
    for key, value in leaves(config):
        node, _, name = key.rpartition(".")
        schema = OmegaConf.get_type(OmegaConf.select(config, node) if node else config)
        print(f"  {f'{key}={show(value)}':<42} {meanings(schema).get(name, '')}".rstrip())
