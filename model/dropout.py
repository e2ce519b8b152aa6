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
    threshold, scale = _rule(p)
    if x.dtype in native.WIDTHS and native.usable(x):
        return _Dropped.apply(x, counter.places(keys, site), threshold, scale)  # pyright: ignore[reportReturnType]
    kept = counter.bits(keys, site, x.shape[1], x.shape[2]) >= threshold
    return x * kept * scale


def add_dropped(x: Hidden, branch: Hidden, p: float, keys: Int64[Tensor, " rows"] | None, site: int) -> Hidden:
    """x + drop(branch, ...)."""
    if x.dtype == torch.float32 and branch.dtype in native.WIDTHS and native.usable(x):
        places = None if keys is None or p == 0.0 else counter.places(keys, site)
        return _Added.apply(x, branch, places, *_rule(p))  # pyright: ignore[reportReturnType]
    return x + drop(branch, p, keys, site)


def _rule(p: float) -> tuple[int, float]:
    """From which 32 bits on, as a signed integer, an element is kept; what it is then multiplied by."""
    return round(p * 2**32) - 2**31, 1.0 / (1.0 - p)


class _Dropped(torch.autograd.Function):
    """The same in one pass over memory; the mask is drawn again for the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, places, threshold, scale = inputs
        ctx.save_for_backward(places)
        ctx.rule = threshold, scale
        return _zeroed(x, x.dtype, places, ctx.rule)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Any
    ) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return _zeroed(grads[0], grads[0].dtype, places, ctx.rule), None, None, None


class _Added(torch.autograd.Function):
    """The sum and the dropout in one pass; the gradient of `branch` is dropped and rounded in another."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, branch, places, threshold, scale = inputs
        x, branch, out = x.contiguous(), branch.contiguous(), torch.empty(x.shape)
        narrowed = branch.dtype == torch.bfloat16
        native.call("add_dropped", x, branch, narrowed, out, places, *x.shape, threshold, scale)
        ctx.save_for_backward(places)
        ctx.rest = branch.dtype, (threshold, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Any
    ) -> tuple[Tensor, Tensor, None, None, None]:
        (grad,), (places,), (dtype, rule) = grads, ctx.saved_tensors, ctx.rest
        return grad, grad.to(dtype) if places is None else _zeroed(grad, dtype, places, rule), None, None, None


def _zeroed(x: Tensor, dtype: torch.dtype, places: Tensor, rule: tuple[int, float]) -> Tensor:
    x, out = x.contiguous(), torch.empty(x.shape, dtype=dtype)
    narrow = (x.dtype == torch.bfloat16, dtype == torch.bfloat16)
    native.call("drop", x, narrow[0], out, narrow[1], places, *x.shape, *rule)
    return out
