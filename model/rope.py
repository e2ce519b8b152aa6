"""Rotary position embedding (RoFormer, arXiv:2104.09864) in the half-split layout of Hugging Face's Llama."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from model import native

Heads = Float[Tensor, "batch seq heads head_dim"]


class Rotation(NamedTuple):
    """Cosine and sine of every channel's angle, made once a forward pass and shared by all layers.

    Channel i turns with channel i + head_dim / 2, so that the sine of the first half is negative.
    """

    cos: Float32[Tensor, "#batch seq 1 head_dim"]
    sin: Float32[Tensor, "#batch seq 1 head_dim"]


def angles(positions: Int[Tensor, "#batch seq"], head_dim: int, theta: float) -> Float32[Tensor, "#batch seq 1 half"]:
    """How far each pair of channels turns, in radians.

    In float32: in bfloat16, positions above 256 are no longer distinct integers.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    return positions[:, :, None, None].float() * (1.0 / theta**exponent)


def rotation(positions: Int[Tensor, "#batch seq"], head_dim: int, theta: float) -> Rotation:
    """The turn of every position."""
    angle = angles(positions, head_dim, theta)
    cos, sin = angle.cos(), angle.sin()
    return Rotation(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def rotate(x: Heads, by: Rotation) -> Heads:
    """Turn every pair of channels. Computed in float32 or wider, returned in the dtype of x."""
    return _Rotate.apply(x, *by) if torch.is_grad_enabled() else _turned(x, *by)  # pyright: ignore[reportReturnType]


class _Rotate(torch.autograd.Function):
    """The gradient of a turn is the turn back: nothing but the angles need be kept."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, cos, sin = inputs
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Any
    ) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grads[0], Rotation(cos, -sin)), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if x.dtype == torch.bfloat16 and cos.dtype == torch.float32 and native.usable(x):
        out = torch.empty(x.shape, dtype=x.dtype)
        native.call("rotate", x.contiguous(), cos, sin, out, *x.shape, len(cos))
        return out
    partner = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, partner, sin).to(x.dtype)
