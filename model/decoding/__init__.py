"""Decoding rules, one module each: pure functions from the logits of the next token to other logits.

Contract: a module here defines `transform(logits, value) -> logits`, which sets what it rules out to -inf, raises
ValueError for a value out of range, and an integer `ORDER`. Rules do not commute, so they always apply by rising ORDER:
temperature, then top_k, then top_p, then greedy (the order of Hugging Face's warpers).
"""

from collections.abc import Callable, Mapping
from functools import partial

from jaxtyping import Float
from torch import Tensor

from model import variants

Logits = Float[Tensor, "batch vocab"]
Transform = Callable[[Logits], Logits]


def chain(rules: Mapping[str, int | float]) -> list[Transform]:
    """The transforms of `{"temperature": 0.8, "top_k": 40}` in the order they apply, whatever the order given."""
    modules = {name: variants.load("model.decoding", name) for name in rules}
    ordered = sorted(rules, key=lambda name: modules[name].ORDER)
    return [partial(modules[name].transform, value=rules[name]) for name in ordered]


def is_greedy(transform: Transform) -> bool:
    """Whether a transform leaves one token alone."""
    rule, options = getattr(transform, "func", transform), getattr(transform, "keywords", {})
    return rule is variants.load(__name__, "greedy").transform and bool(options.get("value", 1))
