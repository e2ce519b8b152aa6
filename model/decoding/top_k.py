"""Top-k (arXiv:1805.04833): only the k most likely tokens stay."""

from model.decoding import Logits

ORDER = 20


def transform(logits: Logits, value: int) -> Logits:
    """Keep the `value` largest logits, and what ties with the last of them."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"top_k={value} must be a whole number >= 1")
    smallest = logits.topk(min(value, logits.shape[1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))
