"""PyTorch's fused attention. Runs everywhere; without packing it picks a flash kernel itself."""

from torch.nn.functional import scaled_dot_product_attention

from model.attention import KeyValue, Query
from model.masks import Pattern


def attend(q: Query, k: KeyValue, v: KeyValue, pattern: Pattern) -> Query:
    """Linear memory when the pattern is plain; with packing or a window, the mask of the forward pass is quadratic."""
    mask, groups = pattern.dense, q.shape[2] // k.shape[2]
    if mask is not None and groups > 1 and q.is_cuda:
        # CUDA's fused kernels that take a mask take no grouped heads: PyTorch would silently use one without fusion.
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # SDPA wants heads before the sequence
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=pattern.is_causal, enable_gqa=grouped)
    return out.transpose(1, 2)
