"""The gated feed-forward layer SwiGLU (arXiv:2002.05202)."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from model.linear import Linear, matmul_dtype


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff)
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        x = x.to(matmul_dtype(x))  # once for all that read it
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
