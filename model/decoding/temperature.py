"""Temperature: below 1 sharpens the distribution, above 1 flattens it."""

from model.decoding import Logits

ORDER = 10


def transform(logits: Logits, value: int | float) -> Logits:
    """Logits divided by `value`."""
    if not value > 0:
        raise ValueError(f"temperature={value} must be > 0; for the limit at 0 use greedy")
    return logits / value
