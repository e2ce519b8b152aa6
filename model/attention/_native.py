"""Attention by a kernel of our own for bfloat16 on a CPU: `auto` takes it wherever it can run.

It skips the keys before the first and after the last that a block of queries sees, holds the scores of the block
in the cache, and keeps one number a query for the backward pass. AMX or AVX512-BF16 multiply, whichever there is.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import native
from model.attention import KeyValue, Query
from model.masks import Pattern

STEP = 32
"""What the channels of a head must be a multiple of."""


def takes(q: Query) -> bool:
    """Whether the kernel can take such queries on this machine."""
    return q.dtype == torch.bfloat16 and q.shape[-1] % STEP == 0 and native.usable(q) and native.has("attention")


def attend(q: Query, k: KeyValue, v: KeyValue, pattern: Pattern) -> Query:
    """For what `takes` says; sums and the softmax are in float32."""
    assert pattern.spans.shape[1] == q.shape[1] == k.shape[1]
    assert len(pattern.spans) in (1, len(q))
    return _Attention.apply(*(x.contiguous() for x in (q, k, v)), pattern.spans)  # pyright: ignore[reportReturnType]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, spans = inputs
        out, logs = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
        native.call("attention", q, k, v, spans, out, logs, *_shape(q, k, spans))
        ctx.save_for_backward(q, k, v, spans, out, logs)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Any
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,), (q, k, v, spans, out, logs) = grads, ctx.saved_tensors
        of_q, of_k, of_v = (torch.empty_like(x) for x in (q, k, v))
        given = (grad.contiguous(), q, k, v, spans, out, logs, of_q, of_k, of_v)
        native.call("attention_backward", *given, *_shape(q, k, spans))
        return of_q, of_k, of_v, None


def _shape(q: Tensor, k: Tensor, spans: Tensor) -> tuple[int, ...]:
    batch, seq, heads, d = q.shape
    return batch, seq, heads, k.shape[2], d, len(spans)
