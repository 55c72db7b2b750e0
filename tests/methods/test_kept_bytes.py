"""Holds what a training step on a ViT keeps for the backward pass to a formula for each structure, to the byte.

A formula adds up what operators keep by their definitions. No number in it is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import layouts
import pytest
import torch
from layouts import loss_of, made_config, make_attached, quant

from s2a_cli.activations import REFERENCE
from s2a_cli.memory import saved_bytes
from s2a_cli.methods import STRUCTURES
from s2a_cli.training.step import train_mode

GROUP = 64  # elements that share a scale
UNWRITTEN = {  # structure -> why it has no formula
    "hst": "its side network has convolutions, norms and cross-attentions of a size of their own in each stage",
    "side_tuning": "what it keeps is what an AlexNet keeps, of eight sizes of maps",
}
STOCK_ONLY = {  # structure -> why its formula does not hold under codes
    **dict.fromkeys(("hra", "oft", "road"), "products of its parameters alone are coded as well"),
    "unipt": "its products code some factors by rows, others by columns",
}


@dataclass(frozen=True)
class Kept:
    """Counts the bytes that operators keep, of B images of N tokens, C channels, H heads, L blocks and K classes.

    F: channels within the MLP. S: pixels of a side. bits: of the codes; None: stock PyTorch, in float32. Rows of an
    operator are all tokens of a batch, where nothing else is said.
    """

    B: int
    N: int
    C: int
    H: int
    L: int
    K: int
    F: int
    S: int
    bits: int | None

    def stock(self, size: int, coded: int = 0) -> int:
        """Returns what stock PyTorch keeps, or what is kept under codes in place of that."""
        return size if self.bits is None else coded

    def coded(self, size: int) -> int:
        """Returns what is kept under codes alone, as stock PyTorch shares it with another operator."""
        return self.stock(0, size)

    def floats(self, *shape: int) -> int:
        return 4 * math.prod(shape)

    def tokens(self, width: int) -> int:
        """Returns the bytes of [B, N, width]; a linear layer that trains keeps its input."""
        return self.floats(self.B, self.N, width)

    @property
    def state(self) -> int:
        return self.tokens(self.C)

    def codes(self, rows: int, width: int) -> int:
        """Returns the bytes of packed codes and of a bfloat16 scale for each group of each row."""
        return -(-rows * width * (self.bits or 0) // 8) + 2 * rows * -(-width // GROUP)

    def norm(self, width: int, rows: int = 0) -> int:
        """Keeps the input, and mean and 1 / deviation of each row; or codes, and 1 / deviation."""
        rows = rows or self.B * self.N
        return self.stock(self.floats(rows, width + 2), self.codes(rows, width) + self.floats(rows))

    def attention(self, width: int, heads: int) -> int:
        """Keeps q, k, v, the output and a logsumexp for each query; or codes of q, k and v."""
        rows, each = self.B * heads * self.N, width // heads
        return self.stock(self.floats(rows, 4 * each + 1), 3 * self.codes(rows, each))

    def curve(self, width: int, rows: int = 0, bits: int = 0) -> int:
        """Keeps the input of a GELU or the output of a sigmoid; or codes of the derivative, without scales."""
        count = (rows or self.B * self.N) * width
        return self.stock(self.floats(count), -(-count * (bits or self.bits or 0) // 8))

    def mask(self, width: int, rows: int = 0) -> int:
        """Keeps the noise of a dropout or the output of a ReLU; or a bit an element."""
        return self.curve(width, rows, bits=1)

    def factor(self, width: int) -> int:
        """Keeps a factor of a product; its codes form groups across rows where these come out even."""
        rows = self.B * self.N
        even = rows * width % GROUP == 0
        return self.stock(self.tokens(width), self.codes(*(rows * width // GROUP, GROUP) if even else (rows, width)))

    def token(self, width: int) -> int:
        """Keeps the class token [B, width]; stock PyTorch keeps the tensor of which that is a view."""
        return self.stock(self.tokens(width), self.floats(self.B, width))

    def loss(self, heads: int = 1) -> int:
        """Keeps the log-softmax and the number of samples for each head, and the targets in int64."""
        return heads * self.floats(self.B * self.K + 1) + 8 * self.B

    @property
    def attended(self) -> int:
        """Returns what a frozen attention and its norm keep where a gradient passes through them."""
        return self.norm(self.C) + self.attention(self.C, self.H)

    @property
    def block(self) -> int:
        """Returns what a frozen block keeps where a gradient passes through it: no input of a linear layer."""
        return self.attended + self.norm(self.C) + self.curve(self.F)

    @property
    def end(self) -> int:
        """Returns what the last norm, the head and the loss keep where a gradient passes through the norm."""
        return self.norm(self.C) + self.token(self.C) + self.loss()

    def inputs(self, width: int, hidden: int) -> int:
        """Keeps the inputs of a block's four linear layers; attention keeps that of the second in stock PyTorch."""
        return 2 * self.tokens(width) + self.coded(self.tokens(width)) + self.tokens(hidden)

    def narrow(self, width: int, heads: int) -> int:
        """Returns what a block of a side network keeps, all of which trains."""
        frozen = 2 * self.norm(width) + self.attention(width, heads) + self.curve(4 * width)
        return frozen + self.inputs(width, 4 * width)

    def bottleneck(self, dim: int) -> int:
        """Keeps the inputs of two linear layers and of the nonlinearity between them."""
        return self.state + self.curve(dim) + self.tokens(dim)

    def at_qkv(self, added: int, later: int = 0) -> int:
        """Returns what is kept where each block adapts q, k and v: nothing below the first of these, its norm included.

        later: what is kept for the gradient of the layer's input, which the first block's has not.
        """
        return self.L * (self.block + added) + (self.L - 1) * later - self.norm(self.C) + self.end

    def pooled(self, grid: int) -> Kept:
        """Returns this with the patches averaged to at most grid x grid."""
        return replace(self, N=1 + min(grid, math.isqrt(self.N - 1)) ** 2)


def adaptformer(k: Kept, s: Any) -> int:
    """Shares its input with the norm beside it, which keeps that in all blocks but the first."""
    read = k.L * k.state - (k.L - 1) * k.stock(k.state)
    return (k.L - 1) * k.block + read + k.L * (2 * k.mask(s.dim) + k.tokens(s.dim)) + k.end


def convpass(k: Kept, s: Any) -> int:
    """Keeps the inputs of three layers, two nonlinearities and a mask of each bypass."""
    bypass = k.state + 2 * k.tokens(s.dim) + 2 * k.curve(s.dim) + k.mask(s.dim)
    return k.L * (k.block + 2 * bypass) - k.attended + k.end


def mona(k: Kept, s: Any) -> int:
    """Keeps 1 + w and the norm's weight and bias, made of parameters, and the input that three convolutions share.

    The norm's input is a factor as well; that of the first adapter has no gradient, and no codes.
    """
    made = 2 * k.floats(k.C) + k.stock(k.floats(k.C))
    adapter = made + k.norm(k.C) + k.state + 3 * k.tokens(s.dim) + k.curve(s.dim) + k.mask(s.dim)
    factors = k.coded(k.state + (2 * k.L - 1) * k.factor(k.C))
    return k.L * (k.block + 2 * adapter) + factors - k.attended + k.end


def fact(k: Kept, s: Any, core: int) -> int:
    """Keeps x, U x, a mask and V's input of each layer, and its core where that is no parameter.

    A layer has (inputs, outputs) for each channel of a hidden state.
    """
    layers = [(1, 3), (1, 1), (1, k.F // k.C), (k.F // k.C, 1)]
    narrow = sum(k.tokens(s.rank * (into + out)) + k.mask(s.rank * out) for into, out in layers)
    cores = sum(k.floats(into * out, s.rank, s.rank) for into, out in layers)
    return k.at_qkv(k.inputs(k.C, k.F) + narrow + core * cores)


def dtl(k: Kept, s: Any, fused: int) -> int:
    """Keeps what is read of every block, and a swish's input of those to whose output the side state is added.

    A gradient passes through all of these but the first: there a norm keeps what is read, in stock PyTorch.
    """
    added = math.ceil(s.share * k.L)
    read = k.L * (k.tokens(s.rank) + k.state) - (added - 1) * k.stock(k.state)
    return read + added * (k.curve(k.C) + fused * k.state) + (added - 1) * k.block + k.end


def ssf(k: Kept, s: Any) -> int:
    """Keeps all that is scaled; the patches have no gradient before that, and no codes."""
    blocks = k.L * (k.block + 4 * k.factor(k.C) + k.factor(3 * k.C) + k.factor(k.F))
    return k.floats(k.B, k.N - 1, k.C) + blocks + k.factor(k.C) + k.end


def lst(k: Kept, s: Any) -> int:
    """Keeps the hidden states, and of each gate mu and the difference that it weighs."""
    width = k.C // s.reduction
    heads = next(n for n in range(max(1, width // s.head_width), 0, -1) if width % n == 0)
    gate = k.curve(1, rows=1) + k.coded(k.floats(1)) + k.tokens(width)
    end = k.norm(width) + k.token(width) + k.floats(k.B, k.C) + k.loss()
    return (k.L + 1) * k.state + k.L * (gate + k.narrow(width, heads)) + end


def qst(k: Kept, s: Any) -> int:
    """Keeps each hidden state and what makes it narrow, and of each gate the difference that it weighs."""
    width = k.C // s.reduction
    heads = next(n for n in range(min(width, s.heads), 0, -1) if width % n == 0)
    down = k.state + k.curve(s.rank) + k.tokens(s.rank) + k.norm(width)
    gate, last = (k.curve(n, rows=1) + k.coded(k.floats(n)) for n in (width, k.C))
    up = k.norm(width, rows=k.B) + k.stock(k.floats(k.B, k.N - 1, width)) + k.floats(k.B, width)
    blocks = (k.L + 1) * down + k.L * (gate + k.tokens(width) + k.narrow(width, heads))
    return blocks + up + last + 2 * k.floats(k.B, k.C) + k.loss()


def readers(k: Kept, s: Any) -> int:
    """Keeps tokens in 8 bits, attention weights, means, a norm, its result, a classifier's input and a loss for each
    block, nothing in codes; and the factors of products, which the blocks of one shape share a tensor of.
    """
    n, read = k.pooled(s.grid).N, s.heads * s.width
    seen = k.B * n * k.C + k.floats(k.B, s.heads, n + k.C)
    factors = k.floats(k.C + 1 + k.K, read)
    return k.L * (seen + k.floats(k.B, 3 * read + 2) + factors) + k.loss(k.L + 1) - k.loss()


def s2a_paper(k: Kept, s: Any) -> int:
    """Keeps, of the ladder, attention and the inputs of its layers; the head reads a sum in place of a view."""
    width, few = max(1, round(k.C / s.side.pooled / 4)) * 4, k.pooled(s.side.grid)
    rung = few.norm(width) + few.tokens(width) + few.attention(width, heads=4) + few.coded(few.tokens(width))
    added = k.L * rung + few.norm(width) + k.floats(k.B, width + k.C)
    return FORMULAS["bias"](k, s) - k.token(k.C) + added


def unipt(k: Kept, s: Any) -> int:
    """Keeps relu(h), t, attention weights, a mean and q * mean of each state, its gate, and what is merged of it.

    The weights are kept before and after their division by a sum, which is kept before and after it is bounded.
    """
    width = k.C // s.reduction
    each = k.state + k.tokens(width + 2) + 2 * k.floats(k.B, 1 + width) + k.floats(k.B, 1 + width)
    return (k.L + 1) * each + 2 * k.floats(k.B, k.C + width) + k.loss()


def vpt(k: Kept, s: Any) -> int:
    """Has more tokens within blocks; the last norm reads a view, behind which stock PyTorch keeps the prompts."""
    return k.L * replace(k, N=k.N + s.tokens).block + k.stock(k.floats(k.B, s.tokens, k.C)) + k.end


def lokr(k: Kept, s: Any) -> int:
    """Keeps the changes of all four weights, and their second factor where that is a product itself."""
    factors = 0
    for shape in ((3 * k.C, k.C), (k.C, k.C), (k.F, k.C), (k.C, k.F)):
        second = [n // max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0) for n in shape]
        factors += k.floats(*second) * (s.peft.r < max(second) / 2)
    return k.at_qkv(k.inputs(k.C, k.F) + k.floats(k.C, k.C + 2 * k.F) + factors, later=k.floats(3 * k.C, k.C))


def boft(k: Kept, s: Any) -> int:
    """Keeps two matrices and an LU decomposition with int32 pivots of each rotation, and products of these.

    The last product is with an identity matrix. Then x is rotated, and each output scaled.
    """
    size, count = s.peft.boft_block_size, s.peft.boft_n_butterfly_factor
    made = k.floats(count, k.C, 3 * size + 1) + k.floats(2 * count - 1, k.C, k.C)
    return k.at_qkv(made + k.state + k.tokens(3 * k.C) + 2 * k.floats(3 * k.C), later=k.floats(k.C, k.C))


FORMULAS: dict[str, Callable[[Kept, Any], int]] = {
    **{f.__name__: f for f in (adaptformer, boft, convpass, lokr, lst, mona, qst, s2a_paper, ssf, unipt)},
    "linear": lambda k, s: k.token(k.C) + k.loss(),
    # Keeps the images in stock PyTorch, as the bias of a convolution trains.
    **dict.fromkeys(("bias", "bitfit"), lambda k, s: k.stock(k.floats(k.B, 3, k.S, k.S)) + k.L * k.block + k.end),
    **dict.fromkeys(("layernorm", "prompt"), lambda k, s: k.L * k.block + k.end),
    "full": lambda k, s: k.floats(k.B, 3, k.S, k.S) + k.L * (k.block + k.inputs(k.C, k.F)) + k.end,
    "partial": lambda k, s: s.k * (k.block + k.inputs(k.C, k.F)) + k.end,
    # Adapts what the first attention returns, or begins beside that, and keeps nothing below.
    **dict.fromkeys(
        ("adapter_houlsby", "res_tuning"),
        lambda k, s: k.L * (k.block + 2 * k.bottleneck(s.dim)) - k.attended + k.end,
    ),
    # Adapts what the first block returns.
    "adapter_pfeiffer": lambda k, s: (
        (k.L - 1) * k.block + k.L * (k.state + k.curve(s.dim) + k.mask(s.dim) + k.tokens(s.dim)) + k.end
    ),
    # Keeps the scaled weight of a layer, and which samples go past.
    "adapter_plus": lambda k, s: (
        (k.L - 1) * k.block + k.L * (k.bottleneck(s.dim) + k.floats(k.C, s.dim) + k.floats(k.B)) + k.end
    ),
    "repadapter": lambda k, s: k.at_qkv(2 * (k.state + k.mask(s.dim) + k.tokens(s.dim))),
    "res_tuning_bypass": lambda k, s: 2 * k.L * k.bottleneck(s.dim) + k.end,
    "dtl": lambda k, s: dtl(k, s, fused=0),
    "dtl_plus": lambda k, s: dtl(k, s, fused=1),
    "fact_tt": lambda k, s: fact(k, s, core=0),
    "fact_tk": lambda k, s: fact(k, s, core=1),
    "head2toe": lambda k, s: k.token(k.C) + k.L * k.floats(k.B, k.C, min(max(1, s.target // k.C), k.N)) + k.loss(),
    "side": lambda k, s: FORMULAS["linear"](k, s) + readers(k, s),
    "s2a": lambda k, s: FORMULAS["bias"](k, s) + readers(k, s.side),
    "vpt_shallow": vpt,
    "vpt_deep": lambda k, s: vpt(k, s) + k.L * k.mask(k.C, rows=k.B * s.tokens),
    **dict.fromkeys(("lora", "peft"), lambda k, s: k.at_qkv(k.state + k.tokens(s.peft.get("r", 8)))),
    # Counts an identity matrix and A's image of it, too, which the forward pass frees; scales W x and B A x.
    "dora": lambda k, s: k.at_qkv(
        k.floats(k.C, k.C + s.peft.r) + k.tokens(k.C + s.peft.r) + 2 * (k.tokens(3 * k.C) + k.floats(3 * k.C)),
        later=k.floats(3 * k.C),
    ),
    "vera": lambda k, s: k.at_qkv(k.tokens(s.peft.r) + k.tokens(3 * k.C)),
    "ia3": lambda k, s: k.at_qkv(k.tokens(3 * k.C) + k.tokens(k.F) + k.floats(k.F), later=k.floats(3 * k.C)),
    "miss": lambda k, s: k.at_qkv(k.tokens(s.peft.r)),
    "c3a": lambda k, s: k.at_qkv(k.state),
    # Keeps two int64 places for each coefficient.
    "fourierft": lambda k, s: k.at_qkv(16 * s.peft.n_frequency + k.state, later=k.floats(3 * k.C, k.C)),
    # Keeps the changes of all four weights, and a scale of each.
    "loha": lambda k, s: k.at_qkv(
        k.inputs(k.C, k.F) + k.floats(k.C, k.C + 2 * k.F) + k.floats(4), later=k.floats(3 * k.C, k.C)
    ),
    "randlora": lambda k, s: k.at_qkv(k.state, later=k.floats(s.peft.r * math.ceil(k.C / s.peft.r), k.C)),
    # Keeps the angle, its cosine and sine and the length at each output, and x and x turned by 90 degrees.
    "road": lambda k, s: k.at_qkv(4 * k.floats(3 * k.C) + 2 * k.tokens(3 * k.C), later=2 * k.floats(3 * k.C)),
    # Keeps three powers of a matrix.
    "oft": lambda k, s: k.at_qkv(
        3 * k.floats(k.C, s.peft.oft_block_size) + k.state, later=k.floats(k.C, s.peft.oft_block_size)
    ),
    # Keeps u, its norm, 2 W and 2 W u of each reflection, and an identity matrix.
    "hra": lambda k, s: k.at_qkv(
        k.floats(s.peft.r, 1 + 2 * k.C + k.C**2) + k.floats(k.C, k.C) + k.state, later=k.floats(3 * k.C, k.C)
    ),
}
SIZES = dict(img_size=48, patch_size=16, embed_dim=80, depth=4, num_heads=5, mlp_ratio=3)  # of the second layout
OTHER = (  # its settings, each where a structure has one of this name and type
    dict(dim=5, groups=5, k=2, rank=3, reduction=5, share=0.75, target=200, tokens=5)
    | dict(grid=2, heads=3, pooled=5, width=5)
    | dict(block_size=16, boft_n_butterfly_factor=3, group_size=16, n_frequency=7, oft_block_size=8, r=3)
)


def test_every_structure_has_a_formula_or_a_reason():
    fitting = {name for name, kind in STRUCTURES.items() if "vit" in kind.families}
    assert fitting == {*FORMULAS} | {*UNWRITTEN} and not {*FORMULAS} & {*UNWRITTEN} and {*STOCK_ONLY} <= {*FORMULAS}


@pytest.mark.parametrize("method", FORMULAS)
@pytest.mark.parametrize("layout", ["first", "second"])
def test_kept_bytes(layout, method, monkeypatch):
    settings = {}
    if layout == "second":
        settings = others(made_config("vit", method))
        monkeypatch.setitem(layouts.BACKBONES, "vit", dict(layouts.BACKBONES["vit"], image_size=48, kwargs=SIZES))
        monkeypatch.setattr(layouts, "CLASSES", 5)
        monkeypatch.setattr(layouts, "batch", lambda backbone: (torch.zeros(3, 3, 48, 48), torch.tensor([0, 4, 2])))
    made, config = make_attached("vit", method, **settings), made_config("vit", method, **settings)
    train_mode(made.model)
    for bits in (None,) if method in STOCK_ONLY else (None, 4):
        found = saved_bytes(lambda b=bits: loss_of(made.backbone, quant(b) if b else REFERENCE), made.model)
        assert found == FORMULAS[method](sizes_of(made.backbone, bits), config), f"bits={bits}"


def others(config: Any) -> dict[str, Any]:
    """Returns other settings than these."""
    nested = {name: others(value) for name, value in config.items() if hasattr(value, "items")}
    return nested | {name: OTHER[name] for name in config if type(config[name]) is type(OTHER.get(name, ...))}


def sizes_of(backbone: Any, bits: int | None) -> Kept:
    block, images = backbone.blocks[0], layouts.batch(backbone)[0]
    (tokens, channels), mlp = block.input.shape, block.branch("mlp").linears
    heads, within = block.module.attn.num_heads, mlp[0][1].out_features
    blocks, classes = len(backbone.blocks), backbone.head.classes
    return Kept(len(images), tokens, channels, heads, blocks, classes, within, images.shape[-1], bits)
