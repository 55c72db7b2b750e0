"""Shell completion: commands are completed here, settings by Hydra, which gets the line without the command."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from s2a_cli.cli.commands import COMMANDS
from s2a_cli.cli.main import FLAGS
from s2a_cli.common.errors import UserError
from s2a_cli.common.text import nearest
from s2a_cli.config.compose import composable, method_schema
from s2a_cli.config.loading import hydra_on
from s2a_cli.config.overrides import CONF
from s2a_cli.config.schema import RunConfig
from s2a_cli.config.settings import merge, plain, rule_of, walk
from s2a_cli.config.structures import STRUCTURES

SCRIPTS = {
    "bash": r"""
_s2a() {
    local IFS=$'\n' line="${COMP_LINE:0:COMP_POINT}"
    local word="${line##* }"
    COMPREPLY=($(COMP_LINE="$line" "${COMP_WORDS[0]}" --complete 2>/dev/null))
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} != *[=./] ]] && compopt +o nospace
    local head="${word%"${word##*[=:]}"}"  # readline starts a new word behind = and :
    COMPREPLY=("${COMPREPLY[@]#"$head"}")
}
complete -o nospace -o default -F _s2a s2a""",
    "zsh": r"""
_s2a() {
    local -a choices
    choices=("${(@f)$(COMP_LINE="$LBUFFER" "${words[1]}" --complete 2>/dev/null)}")
    [[ -n "$choices" ]] || { _files; return }
    compadd -Q -S '' -- ${(M)choices:#*[=./]}
    compadd -Q -- ${choices:#*[=./]}
}
compdef _s2a s2a""",
    "fish": r"""
function __s2a_complete
    set -l command (commandline -opc)[1]
    COMP_LINE=(commandline -cp) $command --complete 2>/dev/null
end
complete -c s2a -a '(__s2a_complete)'""",
}


def script(shell: str) -> str:
    """Returns the text that a shell must read to complete s2a. Raises UserError for another shell."""
    if shell not in SCRIPTS:
        raise UserError(f"--completion {shell}: expected one of {', '.join(SCRIPTS)}{nearest(shell, SCRIPTS)}")
    return SCRIPTS[shell].lstrip("\n")


def complete(line: str) -> list[str]:
    """Returns what the last word of a command line, up to the cursor, can become."""
    words = line.split()[1:] + ([""] if line.endswith(" ") else [])
    if not words:
        return []
    *before, word = words
    if word.startswith("-"):
        return [flag for flag, (_, about) in FLAGS.items() if about and flag.startswith(word)]
    before = [w for w in before if not w.startswith("-")]
    if not before:
        return [command for command in COMMANDS if command.startswith(word)]
    command = COMMANDS.get(before[0])
    if command is None:
        return []
    found = [choice for choice in command.words if choice.startswith(word)]
    if command.config is None or word.startswith("run="):
        return found
    return found + _settings(before[1:], word)


def _settings(before: list[str], word: str) -> list[str]:
    """Returns the settings, or the values of one, that the word can become behind the words before it."""
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin

    key, equals, value = word.partition("=")
    rule = next((rule_of(schema, name) for full, schema, name in walk(RunConfig) if full == key), None)
    if equals and rule and rule.choices:
        return [f"{key}={choice}" for choice in rule.choices if choice.startswith(value)]
    with hydra_on(CONF) as loader:
        with_schema: Any = _WithSchema(loader)
        found = DefaultCompletionPlugin(with_schema)._query("config", " ".join([*composable(before), word]))
    return [choice for choice in found if not choice.startswith("hydra")]


class _WithSchema:
    """Stands in for Hydra's config loader: its configs also have the fields that only the schema names."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        """Returns what Hydra composes, on top of the schema's defaults."""
        loaded = self.loader.load_configuration(*args, **kwargs)
        OmegaConf.set_struct(loaded, False)
        schema = plain(OmegaConf.structured(RunConfig))
        del schema["method"]
        merged = merge(schema, loaded)
        name = loaded.method.get("name")
        if name in STRUCTURES:
            merged.method = merge(plain(OmegaConf.structured(method_schema(name))), merged.method)
        return merged
