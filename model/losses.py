"""Cross-entropy of a linear head without its logits: computed in chunks of rows, each forgotten before the next."""

from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import native
from model.batch import IGNORE
from model.linear import matmul_dtype, product, sum_products, sums_products

CHUNK_LOGITS = defaultdict(lambda: 2**26, cpu=2**24)
"""Logits held at once: enough rows for products at full speed, and still few of a step (in bfloat16, 32 MiB or 128)."""

BLOCK_LOGITS = defaultdict(lambda: 2**26, cpu=2**20)
"""Logits turned into probabilities at once: on a CPU what stays in the cache of a core between two passes."""

Hidden = Float[Tensor, "rows d_model"]
Weight = Float[Tensor, "vocab d_model"]
Targets = Int64[Tensor, " rows"]
Grads = tuple[Tensor, Tensor]


def linear_cross_entropy(hidden: Hidden, weight: Weight, targets: Targets) -> Float32[Tensor, ""]:
    """The sum over rows of -log softmax(hidden @ weight.T)[target], in nats; rows with target IGNORE add nothing.

    Matrix products run in the autocast dtype where autocast is on, the rest in float32. When a gradient is wanted it
    is computed here, chunk by chunk, since the logits are at hand (Liger Kernel, arXiv:2410.10989).
    """
    dtype = matmul_dtype(hidden)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, dtype)  # pyright: ignore[reportReturnType]
    return _loss_and_grads(hidden, weight, targets, dtype, None)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden, weight, targets, dtype = inputs
        grads = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32))
        total = _loss_and_grads(hidden, weight, targets, dtype, grads)
        ctx.save_for_backward(grads[0], grads[1].to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Any
    ) -> tuple[Tensor, Tensor, None, None]:
        (grad,), (grad_hidden, grad_weight) = grads, ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad.to(grad_weight.dtype), None, None


def _loss_and_grads(h: Tensor, w: Tensor, targets: Tensor, dtype: torch.dtype, grads: Grads | None) -> Tensor:
    """The loss; with `grads`, also write the gradient of h into the first and add that of w to the second."""
    chunk = max(1, CHUNK_LOGITS[h.device.type] // w.shape[0])
    total = torch.zeros((), dtype=torch.float32, device=h.device)
    h, w = h.to(dtype), w.to(dtype)
    for start in range(0, h.shape[0], chunk):
        rows = slice(start, start + chunk)
        logits = product(h[rows], w, transposed=True)
        total += _rows(logits, targets[rows], grads is not None)
        if grads is not None:
            grads[0][rows] = product(logits, w)
            _add_products(grads[1], logits, h[rows])
    return total


def _rows(logits: Tensor, targets: Tensor, with_grad: bool) -> Tensor:
    """The sum of the rows' losses in float32 (or wider); if wanted, `logits` become their own gradient."""
    if logits.dtype == torch.bfloat16 and native.usable(logits):
        _refuse_unknown(targets, logits.shape[1])
        losses = torch.empty(len(logits))
        native.call("cross_entropy", logits, targets.contiguous(), losses, *logits.shape, IGNORE, with_grad)
        return losses.sum()
    block = max(1, BLOCK_LOGITS[logits.device.type] // logits.shape[1])
    blocks = zip(logits.split(block), targets.split(block), strict=True)
    return torch.stack([_block(rows, wanted, with_grad) for rows, wanted in blocks]).sum()


def _refuse_unknown(targets: Tensor, vocab: int) -> None:
    """Raises IndexError, as PyTorch's gather does, for a target that is no column of the logits."""
    lowest, highest = targets.where(targets != IGNORE, 0).aminmax()
    if lowest < 0 or highest >= vocab:
        raise IndexError(f"targets from {lowest} to {highest} are out of bounds for a vocabulary of {vocab}")


def _block(logits: Tensor, targets: Tensor, with_grad: bool) -> Tensor:
    """With m the row's largest logit, the loss is (m - logit[target]) - log softmax[m]: one exponential serves both.

    softmax[m] is at least 1 / vocab, so its logarithm is exact however unlikely the target is.
    """
    counted = targets != IGNORE
    index = targets.where(counted, 0)[:, None]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    softmax = wide.softmax(dim=1)
    losses = (wide.amax(1) - wide.gather(1, index).squeeze(1) - softmax.amax(1).log()) * counted
    if with_grad:
        softmax.scatter_add_(1, index, softmax.new_full((1, 1), -1.0).expand_as(index))
        logits.copy_(softmax.mul_(counted[:, None]))
    return losses.sum()


def _add_products(total: Tensor, logits: Tensor, h: Tensor) -> None:
    """total += logits.T @ h"""
    if (total.dtype, logits.dtype) == (torch.float32, torch.bfloat16) and sums_products(h, total):
        sum_products(logits, h, total, more=True)
    else:
        total.add_(logits.T @ h)
