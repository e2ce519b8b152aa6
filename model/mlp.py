"""The gated feed-forward layer SwiGLU (arXiv:2002.05202)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from model import native
from model.linear import Linear

Wide = Float[Tensor, "*rows d_ff"]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff)
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


def gated(gate: Wide, up: Wide) -> Wide:
    """silu(gate) * up."""
    if gate.dtype == up.dtype == torch.bfloat16 and native.usable(gate):
        return _Gated.apply(gate.contiguous(), up.contiguous())  # pyright: ignore[reportReturnType]
    return silu(gate) * up


class _Gated(torch.autograd.Function):
    """The same in one pass over memory, rounded once."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        gate, up = inputs
        out = torch.empty_like(gate)
        native.call("swiglu", gate, up, out, gate.numel())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Any
    ) -> tuple[Tensor, Tensor]:
        (grad,), (gate, up) = grads, ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        native.call("swiglu_backward", grad.contiguous(), gate, up, of_gate, of_up, gate.numel())
        return of_gate, of_up
