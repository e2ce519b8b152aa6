"""Root-mean-square normalisation (arXiv:1910.07467), rounding in the same places as Hugging Face's Llama."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import rms_norm


class RMSNorm(nn.Module):
    """Scales the last dimension to unit mean square, in float32 or wider, then by a learned weight."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape d_model"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype)
