"""Factors of channels, in the form in which what a product keeps can be coded."""

from __future__ import annotations

from torch import Tensor


def per_sample(values: Tensor, x: Tensor, last: bool = True) -> Tensor:
    """Returns values [C] as [B, 1, ..., C], or [B, C, 1, ...] where x [B, ...] has its channels second, in x's dtype.

    A product with them keeps codes of x under `quant.attention`; PyTorch's own, with values [C], keeps x.
    """
    shape = (*(1,) * (x.ndim - 1), -1) if last else (1, -1, *(1,) * (x.ndim - 2))
    return values.to(x.dtype).view(shape).expand(x.shape[0], *(-1,) * (x.ndim - 1))
