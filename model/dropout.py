"""Dropout whose mask belongs to the row, not to the run: any micro batch size and any rank gives the same one."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import counter, native

Hidden = Float[Tensor, "rows seq d_model"]


def drop(x: Hidden, p: float, keys: Int64[Tensor, " rows"] | None, site: int) -> Hidden:
    """Zero each element with probability p and scale the rest by 1 / (1 - p); without keys, return x as it is.

    `site` numbers the places in the model, so that each has a mask of its own.
    """
    if keys is None or p == 0.0:
        return x
    threshold, scale = round(p * 2**32) - 2**31, 1.0 / (1.0 - p)
    if x.dtype in native.WIDTHS and native.usable(x):
        return _Dropped.apply(x, counter.places(keys, site), threshold, scale)  # pyright: ignore[reportReturnType]
    kept = counter.bits(keys, site, x.shape[1], x.shape[2]) >= threshold
    return x * kept * scale


class _Dropped(torch.autograd.Function):
    """The same in one pass over memory; the mask is drawn again for the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, places, threshold, scale = inputs
        ctx.save_for_backward(places)
        ctx.rest = threshold, scale
        return _zeroed(x, places, threshold, scale)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Any
    ) -> tuple[Tensor, None, None, None]:
        return _zeroed(grads[0], *ctx.saved_tensors, *ctx.rest), None, None, None


def _zeroed(x: Tensor, places: Tensor, threshold: int, scale: float) -> Tensor:
    x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    native.call("drop", x, out, x.dtype == torch.bfloat16, places, *x.shape, threshold, scale)
    return out
