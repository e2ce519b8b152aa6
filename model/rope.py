"""Rotary position embedding (RoFormer, arXiv:2104.09864) in the half-split layout of Hugging Face's Llama."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

Heads = Float[Tensor, "batch seq heads head_dim"]


class Rotation(NamedTuple):
    """Cosine and sine of every angle, made once a forward pass and shared by all layers."""

    cos: Float32[Tensor, "#batch seq 1 half_head_dim"]
    sin: Float32[Tensor, "#batch seq 1 half_head_dim"]


def rotation(positions: Int[Tensor, "#batch seq"], head_dim: int, theta: float) -> Rotation:
    """The angles of `positions`, in float32: in bfloat16, positions above 256 are no longer distinct integers."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angle = positions[:, :, None, None].float() * (1.0 / theta**exponent)
    return Rotation(angle.cos(), angle.sin())


def rotate(x: Heads, by: Rotation) -> Heads:
    """Turn channel i with channel i + head_dim / 2. Computed in float32 or wider, returned in the dtype of x."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * by.cos - b * by.sin, b * by.cos + a * by.sin], dim=-1).to(x.dtype)
