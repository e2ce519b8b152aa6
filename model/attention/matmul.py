"""Attention as matrix products with the scores in between: on a CPU the fastest for short rows, and quadratic."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.attention import KeyValue, Query
from model.masks import Pattern

BLOCK = 128
"""Queries of a causal body that are scored at once, against no key that all of them are too early to see: of rows of
512 that saves three eighths of the work."""


def attend(q: Query, k: KeyValue, v: KeyValue, pattern: Pattern) -> Query:
    """Everything in the dtype of `q`; what a query weighs, and no more, is held for the backward pass."""
    groups, heads = q.shape[2] // k.shape[2], q.shape[2]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
    mixed: Any = _Attention.apply(q, k, v, pattern.bias, BLOCK if pattern.causal else pattern.seq)
    return mixed.unflatten(0, (-1, heads)).transpose(1, 2)


class _Attention(torch.autograd.Function):
    """softmax(q @ k.T + bias) @ v of [batch * heads, seq, head_dim], some queries at a time.

    By hand, since autograd would mask the gradient of the scores again, which the softmax has already made zero.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, bias, block = inputs
        out, kept = torch.empty_like(q), []
        for queries, keys in _blocks(q.shape[1], block):
            weights = q[:, queries] @ k[:, keys].mT
            weights.unflatten(0, (bias.shape[0], -1)).add_(bias[:, :, queries, keys])
            torch.softmax(weights, dim=-1, out=weights)
            out[:, queries] = weights @ v[:, keys]
            kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.block = block
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Any
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (grad,), (q, k, v, *kept) = grads, ctx.saved_tensors
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for weights, (queries, keys) in zip(kept, _blocks(q.shape[1], ctx.block), strict=True):
            of_v[:, keys] += weights.mT @ grad[:, queries]
            of_weights = grad[:, queries] @ v[:, keys].mT
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_q[:, queries] = of_scores @ k[:, keys]
            of_k[:, keys] += of_scores.mT @ q[:, queries]
        return of_q, of_k, of_v, None, None


def _blocks(seq: int, block: int) -> list[tuple[slice, slice]]:
    """Queries, and the keys that any of them can see: if there is but one block, all of them."""
    ends = [*range(0, seq, block), seq]
    return [(slice(first, end), slice(end)) for first, end in pairwise(ends)]
