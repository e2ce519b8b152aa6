"""FlashAttention (arXiv:2307.08691) over packed documents: no mask is ever drawn, memory is linear in the sequence."""

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from model.attention import KeyValue, Query
from model.masks import Pattern

if importlib.util.find_spec("flash_attn") is None:
    raise ModuleNotFoundError(
        "attention='flash' needs the package flash_attn, which is not installed: "
        "run `pip install gristmill[flash]` on a machine with CUDA, or set attention='auto'"
    )


def attend(q: Query, k: KeyValue, v: KeyValue, pattern: Pattern) -> Query:
    """Attention of every document alone, in bfloat16 or float16 on CUDA. Raises ValueError for other tensors."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"attention='flash' got {q.dtype} on {q.device}; it runs in bfloat16 or float16 on CUDA: "
            "train under bf16 autocast, or set attention='auto'"
        )
    cu_seqlens, max_seqlen = pattern.cu_seqlens, pattern.max_seqlen
    out = varlen(torch.cuda.get_device_capability(q.device)[0])(
        *(x.flatten(0, 1) for x in (q, k, v)),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        causal=pattern.causal,
        **_window(pattern),
    )
    flat: Tensor = out[0] if isinstance(out, tuple) else out  # flash-attn-4 also returns the log-sum-exp
    return flat.unflatten(0, (pattern.batch, pattern.seq))


def _window(pattern: Pattern) -> dict[str, tuple[int, int]]:
    """Both bounds are inclusive distances, so a window of w tokens reaches w - 1 back."""
    if pattern.sliding_window is None:
        return {}  # "no window" is (-1, -1) in flash-attn 2 and (None, None) in flash-attn-4: leave it to the default
    reach = pattern.sliding_window - 1
    return {"window_size": (reach, 0 if pattern.causal else reach)}


@cache
def varlen(compute_capability: int) -> Callable[..., Any]:
    """flash-attn-4 where its backward pass runs (compute capability 9 and up), else flash-attn 2.

    flash-attn 2.8 ships the folder of flash-attn-4 without what that imports, so only importing it tells.
    """
    if compute_capability >= 9:
        with suppress(ImportError):
            from flash_attn.cute import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

            return flash_attn_varlen_func
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func
