"""The ways to fine-tune a backbone that benchmarks compare: ours, and what stock PyTorch, timm, peft or the compiler
offer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from s2a_cli.backbones import Backbone
from s2a_cli.common.errors import UserError


def checkpoint(backbone: Backbone) -> None:
    """timm's gradient checkpointing (arXiv 1604.06174), a segment a block."""
    model: Any = backbone.model
    if not hasattr(model, "set_grad_checkpointing"):
        raise UserError(f"timm's {type(model).__name__} has no gradient checkpointing")
    model.set_grad_checkpointing()


def selective(backbone: Backbone) -> None:
    """PyTorch's selective checkpointing, a segment a block: products and attention are kept, the rest is made again."""
    aten = torch.ops.aten
    kept = {
        *(aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default),
        *(aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default),
        *(aten._scaled_dot_product_flash_attention_for_cpu.default, aten._scaled_dot_product_cudnn_attention.default),
    }
    contexts = functools.partial(create_selective_checkpoint_contexts, list(kept))
    for block in backbone.blocks:
        block.module.forward = functools.partial(
            torch_checkpoint, block.module.forward, use_reentrant=False, context_fn=contexts
        )


def unfuse(backbone: Backbone) -> None:
    """Attention as products and a softmax, as before fused kernels."""
    fused: list[Any] = [module for module in backbone.model.modules() if getattr(module, "fused_attn", False)]
    if not fused:
        raise UserError("the backbone has no fused attention")
    for module in fused:
        module.fused_attn = False


def lora(backbone: Backbone) -> None:
    """peft's LoRA (arXiv 2106.09685) of rank 8 on the product that makes q, k and v; the head trains too, biases do
    not.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # pyright: ignore[reportMissingImports] (of the extra `bench`)
    except ImportError:
        raise UserError("needs a package that is not here: pip install peft") from None
    if not any(name.endswith(".qkv") for name, _ in backbone.model.named_modules()):
        raise UserError("LoRA on qkv: the backbone has no layer of that name")
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"]), backbone.model)
    for parameter in backbone.head.parameters():
        parameter.requires_grad_(True)


def checkpointed_lora(backbone: Backbone) -> None:
    lora(backbone)
    checkpoint(backbone)


def convolutional(backbone: Backbone) -> None:
    """Maps that lie channels last, where there are maps."""
    if not any(isinstance(module, nn.Conv2d) for block in backbone.block_modules for module in block.modules()):
        raise UserError("the backbone's blocks hold no convolution")


@dataclass(frozen=True)
class Row:
    name: str  # in rows=
    title: str
    words: tuple[str, ...]  # of the config
    ours: bool = False
    change: Callable[[Backbone], None] | None = None  # what others' code does to the model once the method is attached
    offload: bool = False  # what is kept lies in the host's memory
    budget: float | None = None  # of the compiler's activations
    graph: bool = False  # forward and backward pass are replayed as CUDA graphs


def _row(name: str, title: str, words: str, **settings) -> Row:
    return Row(name, title, tuple(words.split()), **settings)


def _last(name: str, title: str, words: str, **settings) -> Row:
    """Another row's words with maps channels last."""
    words = f"{words} backbone.channels_last=true"
    return _row(f"{name}-last", f"{title}, channels last", words, change=convolutional, **settings)


BIAS, TINY8 = "method=bias quant=none", "quant=tiny quant.chunks=8"
ROWS = (
    _row("full", "full fine-tuning", "method=full quant=none"),
    _row("full-unfused", "full, unfused attention", "method=full quant=none", change=unfuse),
    _row("full-ckpt", "full + timm's checkpointing", "method=full quant=none", change=checkpoint),
    _row("linear", "linear probe", "method=linear quant=none"),
    _row("bias", "bias (BitFit), stock PyTorch", BIAS),
    _row("bias-ckpt", "bias + timm's checkpointing", BIAS, change=checkpoint),
    _row("lora", "LoRA qkv r8 (peft)", "method=linear quant=none", change=lora),
    _row("lora-ckpt", "LoRA qkv r8 + timm's checkpointing", "method=linear quant=none", change=checkpointed_lora),
    _row("bias-budget0.3", "bias, compiled, memory budget 0.3", BIAS, budget=0.3),
    _row("bias-budget0.1", "bias, compiled, memory budget 0.1", BIAS, budget=0.1),
    _row("bias-selective", "bias, selective checkpointing: products kept", BIAS, change=selective),
    _row("full-micro8", "full, micro-batches of 8", "method=full quant=none optim.micro_batch=8"),
    _row(
        "full-ckpt-micro8",
        "full + timm's checkpointing, micro-batches of 8",
        "method=full quant=none optim.micro_batch=8",
        change=checkpoint,
    ),
    _row("bias-micro16", "bias, micro-batches of 16", f"{BIAS} optim.micro_batch=16"),
    _row("bias-micro8", "bias, micro-batches of 8", f"{BIAS} optim.micro_batch=8"),
    _row("bias-micro4", "bias, micro-batches of 4", f"{BIAS} optim.micro_batch=4"),
    _row("bias-micro4-graph", "bias, micro-batches of 4 in CUDA graphs", f"{BIAS} optim.micro_batch=4", graph=True),
    _row("bias-micro2", "bias, micro-batches of 2", f"{BIAS} optim.micro_batch=2"),
    _row("bias-micro1", "bias, micro-batches of 1", f"{BIAS} optim.micro_batch=1"),
    _row(
        "bias-ckpt-micro16",
        "bias + timm's checkpointing, micro-batches of 16",
        f"{BIAS} optim.micro_batch=16",
        change=checkpoint,
    ),
    _row("lora-micro4", "LoRA qkv r8, micro-batches of 4", "method=linear quant=none optim.micro_batch=4", change=lora),
    _row("side", "side, stock PyTorch", "method=side quant=none"),
    _row("s2a", "s2a, stock PyTorch", "method=s2a quant=none"),
    _row("s2a-micro4", "s2a, micro-batches of 4", "method=s2a quant=none optim.micro_batch=4"),
    _last("full", "full", "method=full quant=none"),
    _last("linear", "linear probe", "method=linear quant=none"),
    _last("bias", "bias", BIAS),
    _last("s2a", "s2a", "method=s2a quant=none"),
    _row("bias-offload", "bias, save_on_cpu", BIAS, offload=True),
    _row("bias-recompute", "bias, recomputed blocks", f"{BIAS} quant.recompute=block", ours=True),
    _row("bias-recompute8", "the same in 8 pieces", f"{BIAS} quant.recompute=block quant.chunks=8", ours=True),
    _row("exact", "bias, quant=exact", "method=bias quant=exact", ours=True),
    _row("T1", "T1: bias, quant=paper", "method=bias quant=paper", ours=True),
    _row("T2", "T2: bias, quant=int5", "method=bias quant=int5", ours=True),
    _row("T2-s2a", "T2: s2a, quant=int5", "method=s2a quant=int5", ours=True),
    _row("T2-int4", "T2: bias, quant=int4", "method=bias quant=int4", ours=True),
    _row(
        "T2-int4-micro8",
        "T2: bias, quant=int4, micro-batches of 8",
        "method=bias quant=int4 optim.micro_batch=8",
        ours=True,
    ),
    _row(
        "segments",
        "s2a in 3 segments, quant=none; kept: of the last",
        "method=s2a method.segments=3 quant=none",
        ours=True,
    ),
    _row(
        "segments-int4",
        "s2a in 3 segments, quant=int4; kept: of the last",
        "method=s2a method.segments=3 quant=int4",
        ours=True,
    ),
    _last("exact", "bias, quant=exact", "method=bias quant=exact", ours=True),
    _last("T2-int4", "T2: bias, quant=int4", "method=bias quant=int4", ours=True),
    _last("T3", "T3: bias, quant=tiny", "method=bias quant=tiny", ours=True),
    _row("only-pointwise", "bias, GELU' alone in 4 bits", "method=bias quant=exact quant.pointwise=4", ours=True),
    _row("only-norm", "bias, x^ alone in 4 bits", "method=bias quant=exact quant.norm=4", ours=True),
    _row("only-attention", "bias, q, k, v alone in 4 bits", "method=bias quant=exact quant.attention=4", ours=True),
    _row("T3", "T3: bias, quant=tiny", "method=bias quant=tiny", ours=True),
    _row(
        "T3-micro16",
        "T3: bias, quant=tiny, micro-batches of 16",
        "method=bias quant=tiny optim.micro_batch=16",
        ours=True,
    ),
    _row("T3-8", "T3 in 8 pieces", f"method=bias {TINY8}", ours=True),
    _row("T3-s2a", "T3: s2a, quant=tiny", "method=s2a quant=tiny", ours=True),
    _row("T3-s2a-8", "T3: s2a, in 8 pieces", f"method=s2a {TINY8}", ours=True),
    _row("T4", "T4: side, quant=tiny", "method=side quant=tiny", ours=True),
    _row("T4-8", "T4 in 8 pieces", f"method=side {TINY8}", ours=True),
    _row("T5-T3-int8", "T5: T3 in 8 pieces, weights int8", f"method=bias {TINY8} backbone.weights=int8", ours=True),
    _row("T5-T3-nf4", "T5: T3 in 8 pieces, weights NF4", f"method=bias {TINY8} backbone.weights=nf4", ours=True),
    _row("T5-T4-int8", "T5: T4 in 8 pieces, weights int8", f"method=side {TINY8} backbone.weights=int8", ours=True),
    _row("T5-T4-nf4", "T5: T4 in 8 pieces, weights NF4", f"method=side {TINY8} backbone.weights=nf4", ours=True),
)
BY_NAME = {row.name: row for row in ROWS}
