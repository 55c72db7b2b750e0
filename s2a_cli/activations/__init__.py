"""Keeps less between the forward and the backward pass.

    memory = compress_activations("tiny", blocks)
    for images, labels in loader:
        with memory:
            loss = criterion(model(images), labels)
        loss.backward()

Forward values are exactly those of PyTorch. For the backward pass operators keep low-bit codes of what their derivative
needs (S2A, arXiv 2503.08154: "4-bit quantization of activations based on their derivatives"), and blocks keep only
their inputs where they are recomputed. README.md, beside this file, explains how.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from torch import nn

from s2a_cli.activations import kernels  # registers them
from s2a_cli.activations.mode import ActivationMode, uncoded
from s2a_cli.common.arguments import check_type
from s2a_cli.common.errors import UserError
from s2a_cli.config.checks import check_quant
from s2a_cli.config.schema import QuantConfig

REFERENCE = QuantConfig(name="none", lossless=False)  # what PyTorch keeps by itself


def compress_activations(
    config: QuantConfig | str | None = None, blocks: Iterable[nn.Module] = (), **settings: Any
) -> AbstractContextManager[Any]:
    """Returns the context for forward passes, to be made once and entered in every step.

        memory = compress_activations(bits=4)
        memory = compress_activations("tiny", model.blocks)

    It belongs to the thread that enters it, as torch.no_grad does. Settings that keep what PyTorch keeps give a context
    that changes nothing at all.

    config: settings, or the name of some: "int4", "tiny" and what else `s2a ls quants` lists. Without it, the gradient
        stays as it is and less is kept only where that costs nothing.
    blocks: the modules that `recompute` and `chunks` are about; each maps hidden states [B, ...] to others, sample by
        sample.
    settings: of QuantConfig, in place of those of `config`.

    Raises UserError for a config or blocks that are none, and for settings of blocks that are not there; ValueError for
    settings that are out of range or say nothing. Within it, blocks that are recomputed or split may hold no BatchNorm
    in training mode, which reads the batch as a whole and counts each pass: their forward pass raises UserError.
    """
    if config is None:
        config = QuantConfig(name="own")
    elif isinstance(config, str):
        config = QuantConfig.named(config)
    else:
        check_type("config", config, QuantConfig, "a QuantConfig or a name such as 'tiny'")
        if config == QuantConfig(name=config.name) and _means_more(config):
            raise ValueError(
                f"QuantConfig(name={config.name!r}) has a name and no settings; those of that name are"
                f" QuantConfig.named({config.name!r})"
            )
    return context_of(config.changed(**settings), blocks)


def _means_more(config: QuantConfig) -> bool:
    """Tells whether the name of a config stands for other settings than it has."""
    try:
        return QuantConfig.named(config.name) != config
    except ValueError:  # a name of one's own
        return False


def checkpointed(
    blocks: Iterable[nn.Module], *, bits: int | None = None, chunks: int | None = 1
) -> AbstractContextManager[Any]:
    """Returns the context for forward passes whose blocks keep only their input and are computed again in backward.

        memory = checkpointed(model.blocks)

    blocks: modules that map hidden states [B, ...] to others, sample by sample. bits: of the inputs that are kept, 1 to
    8, or 16 for bfloat16; None keeps them as they are, and gradients with them. chunks: of the batch, in which a block
    runs; None: as many as pay on the device. Raises as `compress_activations` does.
    """
    config = QuantConfig(name="checkpointed", lossless=False, recompute="block", input=bits, chunks=chunks)
    return context_of(config, blocks)


def context_of(config: QuantConfig, blocks: Iterable[nn.Module] = ()) -> AbstractContextManager[Any]:
    """Returns the context for forward passes under a config whose name says no more than a table shows.

    Raises as `compress_activations` does.
    """
    blocks = module_list(blocks)
    if problems := check_quant(config):
        raise ValueError("; ".join(problems))
    if config.recompute == "block" and not blocks:
        raise ValueError("recompute='block' needs the blocks: compress_activations(config, model.blocks)")
    if odd := [number for number in config.blocks if number not in range(len(blocks))]:
        raise UserError(
            f"blocks={{{odd[0]}: ...}} of QuantConfig: no block {odd[0]} is among the {len(blocks)} given; give all:"
            " compress_activations(config, model.blocks)"
        )
    return nullcontext() if config.is_reference else ActivationMode(config, blocks)


def module_list(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Returns the blocks that a caller gave. Raises UserError where they are no modules, or one alone."""
    expected = "modules in a list, such as model.blocks"
    check_type("blocks", blocks, Iterable, expected)
    found = cast(list[nn.Module], [blocks] if isinstance(blocks, str) else list(blocks))
    for block in found:
        check_type("blocks", block, nn.Module, expected)
    return found


__all__ = [
    "REFERENCE",
    "ActivationMode",
    "checkpointed",
    "compress_activations",
    "context_of",
    "kernels",
    "module_list",
    "uncoded",
]
