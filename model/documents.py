"""Where documents begin and end in packed rows: a document is a run of equal ids, and so is each stretch of padding."""

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

Ids = Int[Tensor, "batch seq"]
PADDING = -1


def starts(ids: Ids) -> Bool[Tensor, "batch seq"]:
    """True at the first position of every run."""
    changed = ids[:, 1:] != ids[:, :-1]
    return torch.cat([torch.ones_like(ids[:, :1], dtype=torch.bool), changed], dim=1)


def ends(ids: Ids) -> Bool[Tensor, "batch seq"]:
    """True at the last position of every run."""
    changed = ids[:, 1:] != ids[:, :-1]
    return torch.cat([changed, torch.ones_like(ids[:, :1], dtype=torch.bool)], dim=1)


def runs(ids: Ids) -> Int64[Tensor, "batch seq"]:
    """The number of the run each position lies in, counting from 1 in every row."""
    return starts(ids).cumsum(dim=1)


def positions(ids: Ids) -> Int64[Tensor, "batch seq"]:
    """The distance of each position from the first of its run."""
    here = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return here - here.where(starts(ids), 0).cummax(dim=1).values


def lengths(ids: Ids) -> Int64[Tensor, " n_documents"]:
    """How many tokens each document has, in row-major order of appearance."""
    real = ids != PADDING
    first_token = starts(ids)[real].nonzero().squeeze(1)
    return torch.diff(first_token, append=real.sum()[None])
