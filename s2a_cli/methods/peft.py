from __future__ import annotations

import functools
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from s2a_cli.backbones import Backbone, Block
from s2a_cli.backbones.branches import is_linear, is_norm
from s2a_cli.common.errors import UserError
from s2a_cli.common.hooks import reads_output_only
from s2a_cli.common.text import brief, first_line, listed, nearest
from s2a_cli.config.rules import Rule
from s2a_cli.config.schema import POSITIVE
from s2a_cli.config.settings import plain, setting
from s2a_cli.methods.attachment import Attachment
from s2a_cli.methods.base import BlocksSettings, Structure
from s2a_cli.methods.parts import peft_library

ADAPTER = "default"  # peft's name for the one adapter of a layer
LONGEST = 500  # characters of a regular expression
WORDS = ("qkv", "attention", "mlp", "all")
HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)


def _compiles(value: str) -> bool:
    try:
        return len(value) <= LONGEST and bool(re.compile(value))
    except re.error:
        return False


TARGET = Rule(f"{', '.join(WORDS)}, or a regular expression over names of layers", _compiles)
TARGET_HELP = "qkv | attention | mlp | all: layers of each block, or a regular expression for whole names of layers"
LR_SCALE_HELP = "the adapters' learning rate is optim.lr times this"
FIELDS_HELP = "fields of peft's config of this tuner, as they are: {r: 16}"


@dataclass
class TunerSettings(BlocksSettings):
    """The settings of one of peft's tuners."""

    target: str = setting("qkv", help=TARGET_HELP, rule=TARGET)
    peft: dict[str, Any] = setting({}, help=FIELDS_HELP)
    lr_scale: float = setting(1.0, help=LR_SCALE_HELP, rule=POSITIVE)


@dataclass
class PeftSettings(TunerSettings):
    tuner: str = setting("lora", help="lora | vera | oft | ...: peft's name for it, in small letters")


class TunedLayers:
    """The layers of a model that a tuner of peft has put into its own, by name."""

    def __init__(self, model: nn.Module, names: list[str]):
        self.model, self.names = model, names

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((name, self.model.get_submodule(name)) for name in self.names)

    def adapters(self) -> Iterator[nn.Module]:
        """Yields what the tuner has added beside the layers."""
        for _, layer in self:
            yield from (module for name, module in layer.named_children() if name != "base_layer")

    def keep_called(self) -> None:
        """Has layers within an nn.TransformerEncoderLayer called in evaluation too.

        Its fused kernels read their weights instead, unless a module within has a hook.
        """
        for name, layer in self:
            parents = (self.model.get_submodule(name[:end]) for end, letter in enumerate(name) if letter == ".")
            if any(isinstance(parent, nn.TransformerEncoderLayer) for parent in (self.model, *parents)):
                layer.register_forward_hook(is_called)

    def merge(self, name: str) -> None:
        """Adds what the adapters of a layer compute to the weight of that layer, which takes its place again."""
        layer: Any = self.model.get_submodule(name)
        layer.merge()
        plain_layer = layer.get_base_layer()
        for key in [key for key, hook in layer._forward_hooks.items() if hook is is_called]:
            del layer._forward_hooks[key]
        move_hooks(layer, plain_layer)
        self.model.set_submodule(name, plain_layer.train(layer.training))


@reads_output_only
def is_called(module: nn.Module, args: Any, output: Any) -> None:
    """Does nothing; that it is there turns fused kernels off."""


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Moves forward hooks: around a layer they act in the same way on what the tuner computes without calling it."""
    for table in HOOKS:
        setattr(target, table, getattr(source, table))
        setattr(source, table, OrderedDict())


class Peft(Structure):
    """any tuner of the peft library, by method.tuner, on the layers that method.target names

    The layers are replaced by peft's, as its `get_peft_model` does it. The parameters' names are peft's, too.
    Departures: the head is trained as it is, not as a copy (`modules_to_save`); AdaLoRA, OSF, Lily and what is made
    for language models are refused, as are fields that add losses or need images beforehand; BOFT runs without a
    compiler.
    """

    Settings = PeftSettings
    needs = "peft"
    replaces_layers = True
    families = ("vit", "swin")
    words: tuple[str, ...] = WORDS
    tuner = ""  # what a structure of its own name fixes

    @property
    def kind(self) -> str:
        """Returns peft's name for the tuner."""
        return self.tuner or self.settings.tuner

    def attach(self, backbone, beside=()):
        """Wraps each targeted layer, and leaves trainable what was so before.

        Raises UserError where peft is not installed or refuses something, and where a targeted layer got nothing that
        trains.
        """
        peft_library.imported(self.name)
        targets = self._targets(backbone)
        trained = [parameter for parameter in backbone.model.parameters() if parameter.requires_grad]
        self._wrap(backbone, targets)
        for parameter in trained:
            parameter.requires_grad_(True)
        layers = TunedLayers(backbone.model, list(targets))
        for name, layer in layers:
            adapters = set() if layer is targets[name] else {*layer.parameters()} - {*targets[name].parameters()}
            if not any(parameter.requires_grad for parameter in adapters):
                raise UserError(f"method={self.name}: peft's {self.kind} trains nothing at {name}; see method.target")
            move_hooks(targets[name], layer)
        layers.keep_called()
        grouped = self.kind == "lora" and any(getattr(layer, "groups", 1) > 1 for layer in targets.values())
        return Attachment(
            backbone,
            unmergeable="peft merges no LoRA into convolutions with groups" if grouped else "",
            learning_rates=tuple((module, self.settings.lr_scale) for module in layers.adapters()),
            merges=tuple((targets[name], functools.partial(layers.merge, name)) for name in targets),
        )

    def _wrap(self, backbone: Backbone, targets: dict[str, nn.Module]) -> None:
        """Has peft put its layers in the places of these. Raises UserError for what it refuses."""
        config_class, tuner = peft_library.find_tuner(self.kind)
        peft_library.check_layers(self.name, self.kind, backbone.model, targets)
        given = self.settings.peft
        fields = {**self.Settings().peft, **(given if isinstance(given, dict) else plain(given))}
        config = peft_library.make_config(config_class, fields, "|".join(map(re.escape, targets)))
        if self.kind == "ia3":
            config.feedforward_modules = self._read_by_mlp(backbone, targets)
        reads, model = self.kind in peft_library.READ_VALUES, backbone.model
        with peft_library.values_in(model, targets.values()) if reads else nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tuner(model, config, ADAPTER)
            except Exception as error:  # tuners check layers and fields in ways of their own
                layers = TunedLayers(model, list(targets))
                at = next((name for name, layer in layers if layer is targets[name]), "the layers")
                why = f"peft's {self.kind} refuses {at}: {first_line(error)}"
                if self.settings.target in self.words and fields == self.Settings().peft:
                    raise self.misfit(backbone, why) from None
                raise UserError(f"method={self.name}: {why}; see method.target and method.peft") from None
        del model.peft_config

    def _targets(self, backbone: Backbone) -> dict[str, nn.Module]:
        """Returns the layers that the settings name. Raises UserError where one of them can't be wrapped, or none."""
        target = self.settings.target
        found = self._named_by_word(backbone) if target in self.words else self._matched(backbone)
        for name, layer in found.items():
            if backbone.model.get_submodule(name) is not layer:
                raise UserError(f"method={self.name}: another structure has replaced {name}; see method.target")
            if type(layer).__module__.partition(".")[0] != "torch" and is_linear(layer):
                raise UserError(
                    f"method={self.name}: {name} is a {type(layer).__name__}, which computes in a way of its own that"
                    " peft does not know; see method.target"
                )
        return found

    def _named_by_word(self, backbone: Backbone) -> dict[str, nn.Module]:
        """Returns the layers of the adapted blocks that a word such as qkv names."""
        blocks = backbone.adapted_blocks(self.settings.blocks)
        found = {name: layer for block in blocks for name, layer in self.layers_of(block, self.settings.target)}
        if not found:
            raise self.misfit(
                backbone,
                f"no layer of its blocks is what method.target={self.settings.target} stands for (all, or a regular"
                " expression, may find some)",
            )
        return found

    def layers_of(self, block: Block, word: str) -> Iterator[tuple[str, nn.Module]]:
        """Yields (name, layer) of the layers of a block that one of `words` stands for, in the order they run."""
        if word == "all":
            yield from block.layers
        for branch in block.branches:
            if word == branch.kind:
                yield from branch.linears
            elif word == "qkv" and branch.kind == "attention":
                for name, layer in branch.linears[:-1]:
                    if getattr(layer, "in_features", None) == block.input.channels:
                        yield name, layer

    def _matched(self, backbone: Backbone) -> dict[str, nn.Module]:
        """Returns the layers of the adapted blocks, and of what runs beside them, whose whole names match."""
        target, norms = self.settings.target, self.kind == "ln_tuning"
        known = {
            name: module
            for name, module in backbone.adapted_modules(self.settings.blocks)
            if (is_norm(module) if norms else is_linear(module))
        }
        found = {name: module for name, module in known.items() if re.fullmatch(target, name)}
        running = {name: module for name, module in found.items() if backbone.runs(name)}
        if found and not running:
            raise UserError(
                f"method.target={brief(target)}: the model reads the weights of {listed(found, 2)} without running"
                " these layers: what is put around them would do nothing"
            )
        if not running:
            runs = [name for name in known if backbone.runs(name)]
            raise UserError(
                f"method.target={brief(target)}: matches the whole name of none of {listed(runs, 3)}"
                f"{nearest(target, runs)}"
            )
        return running

    def _read_by_mlp(self, backbone: Backbone, names: Iterable[str]) -> str:
        """Returns the regular expression of the last layers of MLPs, whose input IA3 scales instead of their output."""
        branches = [branch for block in backbone.blocks for branch in block.branches if branch.kind == "mlp"]
        last = {branch.linears[-1][0] for branch in branches if branch.linears}
        return "|".join(re.escape(name) for name in names if name in last) or "(?!)"


STRUCTURE = Peft
