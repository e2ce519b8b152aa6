"""Root-mean-square normalisation (arXiv:1910.07467), rounding in the same places as Hugging Face's Llama."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm


class RMSNorm(nn.Module):
    """Scales the last dimension to unit mean square, in float32 or wider, then by a learned weight."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape d_model"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if wide is x and x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _Normed.apply(x, self.weight, self.eps)  # pyright: ignore[reportReturnType]
        return self.weight * rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype)


class _Normed(torch.autograd.Function):
    """The same with its backward pass by hand: on a CPU, PyTorch's reads and writes everything twice as often.

    With n = x / rms(x) and y = w n, the gradient of x is (w g - n mean(w g n)) / rms(x).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, eps = inputs
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, weight, scale)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Any
    ) -> tuple[Tensor, Tensor, None]:
        (grad,), (normed, weight, scale) = grads, ctx.saved_tensors
        both = (grad * normed).reshape(-1, len(weight))
        mean = (both @ weight).div_(-len(weight)).view_as(scale)
        of_x = (grad * weight).addcmul_(normed, mean).mul_(scale)
        return of_x, both.sum(0), None
