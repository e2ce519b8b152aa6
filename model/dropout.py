"""Dropout whose mask belongs to the row, not to the run: any micro batch size and any rank gives the same one."""

from jaxtyping import Float, Int64
from torch import Tensor

from model import counter

Hidden = Float[Tensor, "rows seq d_model"]


def drop(x: Hidden, p: float, keys: Int64[Tensor, " rows"] | None, site: int) -> Hidden:
    """Zero each element with probability p and scale the rest by 1 / (1 - p); without keys, return x as it is.

    `site` numbers the places in the model, so that each has a mask of its own.
    """
    if keys is None or p == 0.0:
        return x
    threshold = round(p * 2**32) - 2**31
    dropped = counter.bits(keys, site, x.shape[1], x.shape[2]) < threshold
    return x.masked_fill(dropped, 0.0) * (1.0 / (1.0 - p))
