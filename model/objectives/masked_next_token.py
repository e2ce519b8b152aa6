"""Masked next-token prediction: a hidden token is asked for one place before it stood (LLM2Vec, arXiv:2404.05961).

So a body and head that learned to predict the next token learn to read both ways without unlearning that.
"""

from jaxtyping import Int, Int64
from torch import Tensor

from model.batch import IGNORE
from model.objectives._masking import Masking, hide
from model.objectives.next_token import loss

__all__ = ["CAUSAL", "EXTRA_TOKENS", "examples", "loss"]

CAUSAL, EXTRA_TOKENS = False, 1


def examples(
    text: Int64[Tensor, "rows seq_plus_one"],
    document_ids: Int[Tensor, "rows seq_plus_one"],
    keys: Int64[Tensor, " rows"],
    masking: Masking,
) -> tuple[Int64[Tensor, "rows seq"], Int64[Tensor, "rows seq"]]:
    """Each hidden token is asked for by the token before it, of the same document."""
    tokens = text[:, :-1]
    inputs, hidden = hide(tokens, keys, masking)
    targets = tokens.new_full(tokens.shape, IGNORE)
    asked = hidden[:, 1:] & (document_ids[:, :-2] == document_ids[:, 1:-1])
    targets[:, :-1] = tokens[:, 1:].where(asked, IGNORE)
    return inputs, targets
