"""A linear layer without bias, which where nothing is learnt takes the faster of two libraries for its product."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

FEW_ROWS, SMALL_WEIGHT = 8, 2**20
"""Below both, PyTorch's own product is ahead of oneDNN's, whose call costs ten microseconds more."""


def linear(x: Float[Tensor, "*rows inputs"], weight: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "*rows outputs"]:
    """x @ weight.T. In float32 on a CPU without a gradient by oneDNN, which uses all of any processor.

    PyTorch gives float32 products to MKL, which on processors of other makers than its own is half as fast
    (`python -m benchmarks.linear`). The operator is the one that PyTorch's own compiler uses; it has no gradient.
    """
    if _onednn_is_faster(x, weight):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
    return functional.linear(x, weight)


def _onednn_is_faster(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and (x.numel() >= FEW_ROWS * weight.shape[1] or weight.numel() >= SMALL_WEIGHT)
        and torch.backends.mkldnn.is_available()
        and not torch.compiler.is_compiling()  # a graph that is exported holds standard operators only
    )


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of x run in: autocast's dtype where it is on, else that of x."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else x.dtype


class Linear(nn.Linear):
    """`nn.Linear` without a bias, by `linear`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        return linear(input, self.weight)
