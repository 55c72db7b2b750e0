"""Finds the tuners of the peft library and makes their configs, and knows what can't train here.

The library is imported when a structure that needs it is attached: it brings transformers along, which takes seconds.
"""

from __future__ import annotations

import importlib
import re
import typing
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from s2a_cli.common.errors import UserError
from s2a_cli.common.text import brief, first_line, nearest
from s2a_cli.config.rules import show

LANGUAGE = "is made for language models"
UNFIT = {  # tuner -> why it can't be trained here
    "adalora": "moves ranks from layer to layer between steps, and adds a loss of its own",
    "lily": "weighs its factors by all images of a batch: what it computes for one depends on the others",
    "osf": "projects gradients in hooks that a copy of the model would lose, and trains nothing of a convolution",
    "poly": "routes by the number of a task, of which an image has none",
    "xlora": "mixes adapters that were trained before",
    "shadow": LANGUAGE,
    "trainable_tokens": "trains rows of an embedding of words",
}
UNFIT_FIELDS = {  # of configs -> why they can't be set; those without a reason are decided by other settings
    **dict.fromkeys(("target_modules", "exclude_modules", "target_parameters"), "method.target chooses the layers"),
    **dict.fromkeys(("feedforward_modules", "fan_in_fan_out"), "it is found from the layers"),
    **dict.fromkeys(("layers_to_transform", "layers_pattern"), "method.blocks chooses the blocks"),
    **dict.fromkeys(("modules_to_save", "inference_mode"), "the head is trained anyway"),
    "bias": "method=[bias,...] trains biases",
    **dict.fromkeys(("megatron_config", "megatron_core", "runtime_config", "layer_replication"), LANGUAGE),
    **dict.fromkeys(("trainable_token_indices", "alora_invocation_tokens", "ensure_weight_tying"), LANGUAGE),
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config"), "it needs images before the first step"),
    **dict.fromkeys(("arrow_config", "loftq_config", "use_qalora", "use_bdlora"), "it is for other kinds of models"),
    **dict.fromkeys(("kasa_config", "monteclora_config"), "it adds a loss of its own"),
    "use_asa": "it moves ranks from layer to layer between steps",
    **dict.fromkeys(("save_projection", "save_indices", "save_precomputed_indices"), "a run saves what it trains"),
    **dict.fromkeys(("save_only_topk_weights", "progressbar", "runtime_offload_base_weight"), "a run decides it"),
}
READ_VALUES = ("adamss", "frod", "shira")  # tuners that begin with what they read of the weights, or of a mask
UNFIT_INITS = ("eva", "corda", "loftq", "lora_ga")  # these need images, or weights of another kind
LARGEST = 10**6  # of the numbers in a config
WORDS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a text"}
WORDS |= {"list": "a list", "dict": "settings {name: value}"}


def imported(method: str) -> Any:
    """Returns the library. Raises UserError, in the name of a method, where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("peft")
    except ModuleNotFoundError as error:
        if error.name == "peft":
            raise UserError(f"method={method} needs peft: pip install 's2a[peft]'") from None
        raise UserError(f"method={method}: peft can't be imported: {first_line(error)}") from None
    except ImportError as error:
        raise UserError(f"method={method}: peft can't be imported: {first_line(error)}") from None


def find_tuner(kind: str) -> tuple[type, type]:
    """Returns the classes of a tuner's config and of the tuner itself. Raises UserError for one that can't train."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    configs = {name.value.lower(): config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    tuners = {name.value.lower(): tuner for name, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    fitting = [name for name, tuner in tuners.items() if tuner and issubclass(tuner, BaseTuner) and name not in UNFIT]
    if kind in configs and kind not in fitting:
        raise UserError(f"method.tuner={kind}: {UNFIT.get(kind, LANGUAGE)}")
    if kind not in fitting:
        raise UserError(
            f"method.tuner={brief(kind)}: expected one of {', '.join(sorted(fitting))}{nearest(kind, fitting)}"
        )
    return configs[kind], tuners[kind]


def make_config(kind: type, settings: dict[str, Any], targets: str) -> Any:
    """Returns the config of a tuner for the layers whose names the regular expression `targets` matches.

    kind: the class of the config. settings: its fields. Raises UserError for fields that it does not have or can't have
    here, and for values that it refuses.
    """
    hints = typing.get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.name not in UNFIT_FIELDS]
    for name, value in settings.items():
        key = f"method.peft.{brief(str(name))}"
        if name in UNFIT_FIELDS:
            raise UserError(f"{key}: can't be set: {UNFIT_FIELDS[name]}")
        if name not in names or name in _of_every_tuner():
            raise UserError(f"{key}: {kind.__name__} of peft has no such field{nearest(str(name), names)}")
        accepted = _accepted(hints[name])
        if type(value).__name__ not in accepted and not (value is None and "NoneType" in accepted):
            words = " or ".join(words for one, words in WORDS.items() if one in accepted)
            raise UserError(f"{key}={brief(show(value))}: expected {words}")
        if isinstance(value, int | float) and not abs(value) <= LARGEST:
            raise UserError(f"{key}={brief(show(value))}: expected at most {LARGEST:,}")
        if name.startswith("init") and str(value).startswith(UNFIT_INITS):
            raise UserError(f"{key}={brief(str(value))}: needs images before the first step, or other weights")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet = {"progressbar": False} if "progressbar" in hints else {}
            return kind(**settings, **quiet, target_modules=targets)
    except Exception as error:  # configs check their fields in ways of their own
        raise UserError(f"method.peft={brief(show(settings))}: peft refuses it: {first_line(error)}") from None


def _of_every_tuner() -> set[str]:
    """Returns the fields that every config has, about where it was stored and for what."""
    from peft import PeftConfig

    return {field.name for field in fields(PeftConfig)}


def _accepted(hint: Any) -> set[str]:
    """Returns the names of the types that a field takes, by its annotation."""
    accepted = set(re.findall(r"\b(int|float|bool|str|list|dict|NoneType)\b", str(hint)))
    if "Literal" in str(hint):
        accepted |= {type(choice).__name__ for choice in _choices(hint)}
    return accepted | ({"int"} if "float" in accepted else set())  # a whole number is one, too


def _choices(hint: Any) -> list[Any]:
    """Returns the values that an annotation names."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [choice for inner in typing.get_args(hint) for choice in _choices(inner)]


def check_layers(method: str, kind: str, model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Raises UserError, in the name of a method, for a layer of a model around which a tuner computes something else.

    Makes ready what the tuner needs.
    """
    holders = Counter(child for module in model.modules() for child in module._modules.values())
    if kind == "boft":
        BlockDiagonals.install()
    for name, layer in layers.items():
        if holders[layer] > 1:
            raise UserError(
                f"method={method}: {name} has several names in the model, and peft would replace it under one of them;"
                " see method.target"
            )
        if {"weight", "bias"} & vars(layer).keys():
            raise UserError(
                f"method={method}: a hook of {name} computes its weight before each call, as weight_norm does, which"
                " peft's layers do not; see method.target"
            )
        if kind == "oft" and max(getattr(layer, "kernel_size", (1,))) > 1:
            raise UserError(
                f"method={method}: peft's oft cuts the input of {name} into patches without its padding, and computes"
                " something else than the layer; see method.target"
            )


@contextmanager
def values_in(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Gives layers of a model on the meta device random weights within, for a tuner that reads them."""
    on_meta = [(layer, name, p) for layer in layers for name, p in layer.named_parameters() if p.is_meta]
    for layer, name, parameter in on_meta:
        setattr(layer, name, nn.Parameter(torch.randn(parameter.shape, dtype=parameter.dtype)))
    yield
    for layer, name, parameter in on_meta:
        setattr(layer, name, parameter)
    if on_meta:
        model.to("meta")  # what the tuner has added


class BlockDiagonals:
    """Stands in for the CUDA extension that BOFT compiles at its first use, with a compiler that few machines have.

    Without one, peft gives up the factors of the butterfly, which are what BOFT adds to OFT.
    """

    @staticmethod
    def forward(blocks: Tensor) -> tuple[Tensor]:
        """Returns the block-diagonal matrices [N, D * H, D * H] of blocks [N, D, H, H]."""
        count, number, size, _ = blocks.shape
        found = blocks.new_zeros(count, number, size, number, size)
        found.diagonal(dim1=1, dim2=3).copy_(blocks.permute(0, 2, 3, 1))
        return (found.view(count, number * size, number * size),)

    @staticmethod
    def backward(grad: Tensor, blocks: Tensor) -> tuple[Tensor]:
        """Returns the gradient of the blocks for that of the matrices."""
        count, number, size, _ = blocks.shape
        grad = grad.reshape(count, number, size, number, size)
        return (grad.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous(),)

    @classmethod
    def install(cls) -> None:
        """Puts it where peft looks for the extension, unless one is there."""
        layer: Any = importlib.import_module("peft.tuners.boft.layer")
        if getattr(layer, "_FBD_CUDA", None) is None:
            layer._FBD_CUDA = cls
