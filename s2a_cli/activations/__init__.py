"""Keeps less between the forward and the backward pass.

    memory = compress_activations(config, blocks)
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
from typing import Any

from torch import nn

from s2a_cli.activations import kernels  # registers them
from s2a_cli.activations.mode import ActivationMode
from s2a_cli.config.checks import check_quant
from s2a_cli.config.schema import QuantConfig

REFERENCE = QuantConfig(name="none", lossless=False)  # what PyTorch keeps by itself


def compress_activations(config: QuantConfig, blocks: Iterable[nn.Module] = ()) -> AbstractContextManager[Any]:
    """Returns the context for forward passes, to be made once and entered in every step.

    It belongs to the thread that enters it, as torch.no_grad does. A config that keeps what PyTorch keeps gives a
    context that changes nothing at all.

    blocks: the modules that `recompute` and `chunks` are about; each maps one tensor [B, ...] to one, sample by sample.

    Raises ValueError for settings that are out of range or say nothing.
    """
    if problems := check_quant(config):
        raise ValueError("; ".join(problems))
    if config.recompute == "block" and not (blocks := list(blocks)):
        raise ValueError("recompute='block' needs the blocks: compress_activations(config, model.blocks)")
    return nullcontext() if config.is_reference else ActivationMode(config, blocks)


__all__ = ["REFERENCE", "ActivationMode", "compress_activations", "kernels"]
