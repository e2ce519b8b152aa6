"""One vector per document of packed rows, in row-major order of appearance."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model import documents

Hidden = Float[Tensor, "batch seq d_model"]
Scores = Float[Tensor, "batch seq 1"]
Pooled = Float[Tensor, "n_documents d_model"]
Ids = Int[Tensor, "batch seq"]
Pool = Callable[[Hidden, Ids | None, Scores | None], Pooled]


def last(hidden: Hidden, ids: Ids | None, scores: Scores | None = None) -> Pooled:
    """The hidden state of each document's last token: in a causal body the only one that has seen all of it."""
    del scores
    if ids is None:
        return hidden[:, -1]
    return hidden[documents.ends(ids) & (ids != documents.PADDING)]


def first(hidden: Hidden, ids: Ids | None, scores: Scores | None = None) -> Pooled:
    """The hidden state of each document's first token, as BERT pools: of use in a body that reads both ways."""
    del scores
    if ids is None:
        return hidden[:, 0]
    return hidden[documents.starts(ids) & (ids != documents.PADDING)]


def mean(hidden: Hidden, ids: Ids | None, scores: Scores | None = None) -> Pooled:
    """The mean of each document's hidden states, summed in float32 or wider and in a fixed order."""
    del scores
    wide = _wide(hidden)
    if ids is None:
        return wide.mean(dim=1).to(hidden.dtype)
    return torch.segment_reduce(wide[ids != documents.PADDING], "mean", lengths=documents.lengths(ids)).to(hidden.dtype)


def attention(hidden: Hidden, ids: Ids | None, scores: Scores | None) -> Pooled:
    """A weighted mean: a state counts by the softmax of its score over its document (Yang et al. 2016, equation 6).

    In float32 or wider and in a fixed order.
    """
    assert scores is not None, "attention pooling needs scores"
    wide, scores = _wide(hidden), _wide(scores)
    if ids is None:
        return (scores.softmax(dim=1) * wide).sum(dim=1).to(hidden.dtype)
    real, lengths = ids != documents.PADDING, documents.lengths(ids)
    highest = torch.segment_reduce(scores[real].detach(), "max", lengths=lengths)
    weights = (scores[real] - highest.repeat_interleave(lengths, dim=0)).exp()
    total, pooled = (torch.segment_reduce(x, "sum", lengths=lengths) for x in (weights, weights * wide[real]))
    return (pooled / total).to(hidden.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


POOLING: Mapping[str, Pool] = {"last": last, "first": first, "mean": mean, "attention": attention}
SCORED = ("attention",)
"""Those that weigh each state by a score that a head learns to give."""
