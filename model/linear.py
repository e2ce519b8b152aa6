"""A linear layer without bias: float32 by the faster of two libraries, learning in bfloat16 by our kernels."""

from typing import Any, NamedTuple

import torch
from jaxtyping import BFloat16, Float, Float32, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model import native

FEW_ROWS, SMALL_WEIGHT = 8, 2**20
"""Below both, PyTorch's own product is ahead of oneDNN's, whose call costs ten microseconds more."""


Weight = Float[Tensor, "outputs inputs"]


def linear(x: Float[Tensor, "*rows inputs"], weight: Weight) -> Float[Tensor, "*rows outputs"]:
    """x @ weight.T. In float32 on a CPU without a gradient by oneDNN, which uses all of any processor.

    PyTorch gives float32 products to MKL, which on processors of other makers than its own is half as fast
    (`python -m benchmarks.linear`). The operator is the one that PyTorch's own compiler uses; it has no gradient.
    With one, under bfloat16 autocast on a CPU, the gradient of the weight is summed by our kernel, in float32, and the
    other two products are by `product`.
    """
    if _onednn_is_faster(x, weight):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
    if _learns_in_bf16(x, weight):
        return _Linear.apply(x.bfloat16(), weight)  # pyright: ignore[reportReturnType]
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


def _learns_in_bf16(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.requires_grad
        and torch.is_grad_enabled()
        and weight.dtype == torch.float32
        and torch.is_autocast_enabled("cpu")
        and matmul_dtype(x) == torch.bfloat16
        and sums_products(x, weight)
    )


class _Linear(torch.autograd.Function):
    """The weight is rounded to bfloat16 as autocast does it; its gradient is not rounded at all."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight = inputs
        rounded_weight = weight.bfloat16()
        ctx.save_for_backward(x, rounded_weight)
        return product(x, rounded_weight, transposed=True)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Any
    ) -> tuple[Tensor | None, Tensor]:
        grad, (x, weight) = grads[0].contiguous(), ctx.saved_tensors
        of_weight = torch.empty(weight.shape)
        sum_products(_rows(grad), _rows(x), of_weight)
        return product(grad, weight) if ctx.needs_input_grad[0] else None, of_weight


def product(
    x: Float[Tensor, "*rows inputs"], weight: Float[Tensor, "inputs outputs"] | Weight, transposed: bool = False
) -> Float[Tensor, "*rows outputs"]:
    """x @ weight, or x @ weight.T, without a gradient: in bfloat16 by our kernel, where one takes the sizes."""
    outputs, inputs = weight.shape if transposed else weight.shape[::-1]
    fits = x.dtype == weight.dtype == torch.bfloat16 and outputs % MULTIPLE == inputs % MULTIPLE == 0
    if not (fits and native.usable(x) and native.has("linear")):
        return x @ (weight.T if transposed else weight)
    out = x.new_empty(*x.shape[:-1], outputs)
    given = (x.contiguous(), weight.contiguous(), out)
    native.call("linear", *given, out.numel() // outputs, inputs, outputs, transposed)
    return out


def _rows(x: Float[Tensor, "*rows n"]) -> Float[Tensor, "all_rows n"]:
    return x.reshape(-1, x.shape[-1]).contiguous()


MULTIPLE = 32
"""What the sizes of matrices are multiples of that our kernels take."""


def sums_products(x: Tensor, weight: Tensor) -> bool:
    """Whether `sum_products` can give the gradient of this weight, for these inputs in bfloat16."""
    return weight.shape[1] % MULTIPLE == 0 and native.usable(x) and native.has("weight_gradient")


def sum_products(
    grad: BFloat16[Tensor, "rows outputs"],
    x: BFloat16[Tensor, "rows inputs"],
    total: Float32[Tensor, "outputs inputs"],
    more: bool = False,
) -> None:
    """total = grad.T @ x, or with `more` added to what it is, summed in float32. All contiguous."""
    outputs, inputs = total.shape
    whole = outputs // MULTIPLE * MULTIPLE
    native.call("weight_gradient", grad, x, total, len(x), outputs, whole, inputs, more)
    if whole < outputs:
        total[whole:].addmm_(grad[:, whole:].float().T, x.float(), beta=float(more))


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
