"""Products of matrices with their own transposes, which are symmetric: by a kernel that computes half of them."""

import torch
from jaxtyping import BFloat16
from torch import Tensor

from model import native
from model.linear import MULTIPLE


def symmetric_product(
    x: BFloat16[Tensor, "matrices n m"],
    by: float = 1.0,
    plus: BFloat16[Tensor, "matrices n n"] | None = None,
    plus_by: float = 0.0,
) -> BFloat16[Tensor, "matrices n n"]:
    """by x xᵀ + plus_by plus, of contiguous matrices, the latter symmetric: so is the result, and half is computed."""
    count, n, m = x.shape
    if n % MULTIPLE or m % MULTIPLE or not (native.usable(x) and native.has("symmetric_product")):
        return x @ x.mT if plus is None else torch.baddbmm(plus, x, x.mT, beta=plus_by, alpha=by)
    out = x.new_empty(count, n, n)
    native.call("symmetric_product", x, plus, out, by, plus_by, count, n, m)
    return out
