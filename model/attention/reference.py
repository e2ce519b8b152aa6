"""Attention written as its equation, in float32 or wider: the numbers every faster kernel must reproduce."""

import torch

from model.attention import KeyValue, Query
from model.masks import Pattern


def attend(q: Query, k: KeyValue, v: KeyValue, pattern: Pattern) -> Query:
    """Scaled dot-product attention (arXiv:1706.03762), quadratic in memory. Float64 stays float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // k.shape[2]
    k, v = (x.to(wide).repeat_interleave(groups, dim=2) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~pattern.allowed, float("-inf")).softmax(dim=-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).to(q.dtype)
