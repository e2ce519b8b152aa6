"""Greedy: only the most likely token stays."""

import torch

from model.decoding import Logits

ORDER = 90


def transform(logits: Logits, value: int = 1) -> Logits:
    """Keep the largest logit, the first of several; a `value` of 0 or False keeps all."""
    if not value:
        return logits
    best = logits.argmax(dim=-1, keepdim=True)
    return torch.full_like(logits, float("-inf")).scatter(1, best, logits.gather(1, best))
