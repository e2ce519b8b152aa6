"""Language modelling: the cross-entropy of every next token."""

from model.batch import IGNORE, Batch, Loss
from model.heads import LanguageModel


def loss(model: LanguageModel, batch: Batch) -> Loss:
    """`batch.targets` is [rows, seq], already shifted: the token after each position, or IGNORE."""
    hidden = model.body(batch.tokens, batch.document_ids, dropout_keys=batch.dropout_keys)
    return Loss(model.head(hidden, batch.targets), (batch.targets != IGNORE).sum())
