"""One vector per document of packed rows, in row-major order of appearance."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model import documents

Hidden = Float[Tensor, "batch seq d_model"]
Pooled = Float[Tensor, "n_documents d_model"]
Ids = Int[Tensor, "batch seq"]
Pool = Callable[[Hidden, Ids | None], Pooled]


def last(hidden: Hidden, ids: Ids | None) -> Pooled:
    """The hidden state of each document's last token: in a causal body the only one that has seen all of it."""
    if ids is None:
        return hidden[:, -1]
    return hidden[documents.ends(ids) & (ids != documents.PADDING)]


def mean(hidden: Hidden, ids: Ids | None) -> Pooled:
    """The mean of each document's hidden states, summed in float32 or wider and in a fixed order."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if ids is None:
        return wide.mean(dim=1).to(hidden.dtype)
    real = ids != documents.PADDING
    first = documents.starts(ids)[real].nonzero().squeeze(1)
    lengths = torch.diff(first, append=real.sum()[None])
    return torch.segment_reduce(wide[real], "mean", lengths=lengths).to(hidden.dtype)


POOLING: Mapping[str, Pool] = {"last": last, "mean": mean}
