"""Language modelling: the cross-entropy of every next token."""

from jaxtyping import Int, Int64
from torch import Tensor

from model.batch import IGNORE, Batch, Loss
from model.heads import LanguageModel
from model.objectives._masking import Masking

CAUSAL, EXTRA_TOKENS = True, 0


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
    hidden = model.body(batch.tokens, batch.document_ids, dropout_keys=batch.dropout_keys)
    return Loss(model.head(hidden, batch.targets), (batch.targets != IGNORE).sum())
