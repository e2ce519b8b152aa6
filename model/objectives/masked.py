"""Masked language modelling: a body that reads both ways finds hidden tokens (BERT, arXiv:1810.04805)."""

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
    """Each hidden token is asked for where it stood."""
    del document_ids
    tokens = text[:, :-1]
    inputs, hidden = hide(tokens, keys, masking)
    return inputs, tokens.where(hidden, IGNORE)
