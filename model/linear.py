"""A linear layer without bias, which where nothing is learnt takes the faster of two libraries for its product."""

from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float, Shaped
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
        and _onednn()
        and not torch.compiler.is_compiling()  # a graph that is exported holds standard operators only
    )


INT8_INPUTS = 16
"""PyTorch's int8 kernel reads so many inputs at once, whether they are there or not."""


class Matrix(NamedTuple):
    """A weight that will not change: floating-point, or int8 in units of each output's scale. No gradient."""

    weight: Shaped[Tensor, "outputs inputs"]
    scales: BFloat16[Tensor, " outputs"] | None = None

    def __call__(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        """x @ weight.T, in the dtype of x, which for int8 is bfloat16."""
        if self.scales is None:
            return linear(x, self.weight)
        product = torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scales)
        return product.unflatten(0, x.shape[:-1])


def rounded(weight: Float[Tensor, "outputs inputs"]) -> Matrix:
    """The weight in int8, of which a processor reads a quarter of what it reads of float32.

    Of a number of inputs that PyTorch's kernel would read past the end of, the weight becomes bfloat16 instead.
    """
    if weight.shape[1] % INT8_INPUTS:
        return Matrix(weight.bfloat16())
    scales = (weight.float().abs().amax(dim=1) / 127).clamp(min=1e-12)
    return Matrix((weight.float() / scales[:, None]).round().to(torch.int8), scales.bfloat16())


def _onednn() -> bool:
    return torch.backends.mkldnn.is_available()


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
