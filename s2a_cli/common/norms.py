"""Normalisations that need care in training: those whose statistics move, and a gradient that PyTorch loses."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from s2a_cli.common.hooks import reads_output_only, sets_modes_only

MANY_ROWS = 1 << 16  # above which PyTorch 2.11 sums the gradients of a narrow LayerNorm on CUDA in two passes


def is_batch_norm(module: nn.Module) -> TypeGuard[_NormBase]:
    """Tells whether a module is a BatchNorm, or an InstanceNorm that has running statistics as one has."""
    return isinstance(module, _BatchNorm) or (isinstance(module, _NormBase) and module.running_mean is not None)


def keep_bias_gradient(module: nn.Module) -> None:
    """Lets the bias of a LayerNorm train beside a weight that is frozen, on CUDA and for many rows as well.

    There PyTorch's backward pass fails: "NativeLayerNormBackward0 returned an invalid gradient at index 2 - got [0]",
    the second of its two passes taking the size of the bias from the gradient of the weight. So that one is computed,
    too, and read by nobody. Does nothing for other modules, nor where the weight trains.
    """
    if not isinstance(module, nn.LayerNorm) or module.weight is None or module.weight.requires_grad:
        return
    if _lend not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_lend)
        module.register_forward_hook(take_back, always_call=True)


def forget_bias_gradient(module: nn.Module) -> None:
    """Undoes `keep_bias_gradient`."""
    for hooks, ours in ((module._forward_pre_hooks, _lend), (module._forward_hooks, take_back)):
        for number, hook in list(hooks.items()):
            if hook is ours:
                del hooks[number]
                module._forward_hooks_always_called.pop(number, None)


def own(weight: Tensor | None) -> Tensor | None:
    """Returns the frozen weight in whose place one with a gradient is, and any other as it is."""
    return getattr(weight, "_s2a_own", weight)


class _WithGradient(torch.autograd.Function):
    """Gives a weight the gradient of a function of the bias, so that it is asked for wherever the bias's is."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor) -> Tensor:
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _loses_gradient(x: Any, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return False
    return x.is_cuda and x.numel() > MANY_ROWS * weight.numel()


@sets_modes_only
def _lend(norm: nn.Module, args: tuple[Any, ...]) -> None:
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    if weight is None or bias is None or weight.requires_grad or not bias.requires_grad:
        return
    if torch.is_grad_enabled() and args and _loses_gradient(args[0], weight):
        lent: Any = _WithGradient.apply(weight, bias)
        lent._s2a_own = weight
        norm._parameters["weight"] = lent


@reads_output_only
def take_back(norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Puts the frozen weight back. A forward hook, which changes nothing that a module returns."""
    weight: Any = norm._parameters.get("weight")
    if own(weight) is not weight:
        norm._parameters["weight"] = own(weight)  # pyright: ignore[reportArgumentType] (a parameter again)
