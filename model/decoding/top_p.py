"""Top-p, or nucleus sampling (arXiv:1904.09751): only the likeliest tokens that together reach probability p stay."""

from model.decoding import Logits

ORDER = 30


def transform(logits: Logits, value: int | float) -> Logits:
    """Keep each token before which, from the likeliest down, less than `value` of the probability has passed."""
    if not 0 < value <= 1:
        raise ValueError(f"top_p={value} must be > 0 and <= 1")
    ordered, index = logits.sort(descending=True, stable=True)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    outside = (before >= value).index_fill(1, index.new_zeros(1), False)  # the likeliest stays, however it rounds
    return logits.masked_fill(outside.scatter(1, index, outside), float("-inf"))
