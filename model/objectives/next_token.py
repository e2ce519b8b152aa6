"""Language modelling: the cross-entropy of every next token."""

from jaxtyping import Int, Int64
from torch import Tensor

from model.batch import IGNORE, Batch, Loss
from model.heads import LanguageModel
from model.objectives._masking import Masking

CAUSAL, EXTRA_TOKENS = True, 0

RARE = 0.5
"""Below this share of places that ask for a token, a CPU computes what only they need for them alone."""


def examples(
    text: Int64[Tensor, "rows seq_plus_one"],
    document_ids: Int[Tensor, "rows seq_plus_one"],
    keys: Int64[Tensor, " rows"],
    masking: Masking,
) -> tuple[Int64[Tensor, "rows seq"], Int64[Tensor, "rows seq"]]:
    """Each token asks for the one after it; the last of a document asks for none. Nothing is hidden."""
    del keys, masking
    return text[:, :-1], text[:, 1:].where(document_ids[:, :-1] == document_ids[:, 1:], IGNORE)


def loss(model: LanguageModel, batch: Batch) -> Loss:
    """`batch.targets` is [rows, seq]: what is asked for at each position, or IGNORE."""
    asks = batch.targets != IGNORE
    count, only, targets = asks.sum(), None, batch.targets
    if asks.device.type == "cpu" and count < RARE * asks.numel():  # a GPU would have to be waited for
        only = asks.flatten().nonzero().squeeze(1)
        targets = targets.flatten()[only][None]
    hidden = model.body(batch.tokens, batch.document_ids, dropout_keys=batch.dropout_keys, only=only)
    return Loss(model.head(hidden, targets), count)
