"""Root-mean-square normalisation (arXiv:1910.07467), rounding in the same places as Hugging Face's Llama."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm

from model import native


class RMSNorm(nn.Module):
    """Scales the last dimension to unit mean square, in float32 or wider, then by a learned weight."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(
        self, x: Float[Tensor, "*shape d_model"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*shape d_model"]:
        """In `dtype`, if one is given: what reads the result may run in another than the residual stream."""
        dtype = dtype or x.dtype
        if x.dtype == self.weight.dtype == torch.float32 and dtype in native.WIDTHS and native.usable(x):
            return _Normed.apply(x.contiguous(), self.weight, self.eps, dtype)  # pyright: ignore[reportReturnType]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (self.weight * rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype)).to(dtype)


class _Normed(torch.autograd.Function):
    """The same in one pass over memory, and its backward pass in another, for which the input alone is kept."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, eps, dtype = inputs
        out, scale = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1])
        native.call("rms_norm", x, weight, out, dtype == torch.bfloat16, scale, scale.numel(), len(weight), eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Any
    ) -> tuple[Tensor, Tensor, None, None]:
        (grad,), (x, weight, scale) = grads, ctx.saved_tensors
        of_x, of_weight = torch.empty_like(x), torch.zeros_like(weight)
        given = (grad.contiguous(), grad.dtype == torch.bfloat16, x, scale, weight, of_x, of_weight)
        native.call("rms_norm_backward", *given, scale.numel(), len(weight))
        return of_x, of_weight, None, None
