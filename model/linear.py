"""A linear layer without bias, which where nothing is learnt takes the faster of two libraries for its product."""

from collections.abc import Callable
from functools import partial

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
        return _by_onednn(weight, x)
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

Product = Callable[[Tensor], Tensor]
"""`x -> x @ weight.T` of a weight that will not change, without a gradient."""


def laid_out(weight: Float[Tensor, "outputs inputs"]) -> Product:
    """The product with a copy of the weight, which on a CPU lies as oneDNN reads it fastest.

    For a few rows at a time that is up to twice as fast in float32 and half as much again in bfloat16.
    """
    weight = weight.detach()
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16) or not _onednn():
        return partial(functional.linear, weight=weight.clone())
    return partial(_by_onednn, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None))


def rounded(weight: Float[Tensor, "outputs inputs"]) -> Product:
    """The product with the weight in int8, each output with a scale of its own; takes and gives bfloat16.

    For a few rows at a time, when reading the weight is all the work, four times as fast as float32. Of a number of
    inputs that PyTorch's kernel would read past the end of, the weight stays bfloat16.
    """
    if weight.shape[1] % INT8_INPUTS:
        return laid_out(weight.bfloat16())
    scales = (weight.detach().float().abs().amax(dim=1) / 127).clamp(min=1e-12)
    whole = (weight.detach().float() / scales[:, None]).round().to(torch.int8)
    return partial(_by_int8, whole, scales.bfloat16())


def _by_onednn(weight: Tensor, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


def _by_int8(weight: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), weight, scales).unflatten(0, x.shape[:-1])


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
