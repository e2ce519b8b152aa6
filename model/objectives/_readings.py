"""What objectives of whole documents share: one reading of a batch, or two with different dropout (R-Drop)."""

from collections.abc import Callable

from jaxtyping import Bool, Float, Float32
from torch import Tensor

from model.batch import Batch, Loss
from model.heads import Classifier

SECOND = 0x5851F42D4C957F2D
"""Turns a row's dropout key into that of its second pass."""

Logits = Float[Tensor, "n n_labels"]
Weights = Float32[Tensor, " n"]


def document_loss(
    model: Classifier,
    batch: Batch,
    counted: Bool[Tensor, " n_documents"],
    entropy: Callable[[Logits], Tensor],
    divergence: Callable[[Logits, Logits, Weights | None], Tensor],
    r_drop: float,
) -> Loss:
    """The summed `entropy` of the logits, over the documents that are `counted`.

    With `r_drop` and dropout each document is read twice, with different dropout: this is half of equation 4 of R-Drop
    (arXiv:2106.14448), alpha being `r_drop`, so that it stays the size of one reading's loss.
    Raises ValueError if the rows do not hold as many documents as there are targets.
    """
    keys = batch.dropout_keys
    logits = model(batch.tokens, batch.document_ids, dropout_keys=keys).float()
    if logits.shape[: batch.targets.ndim] != batch.targets.shape:
        raise ValueError(
            f"targets has shape {tuple(batch.targets.shape)} but the rows hold {logits.shape[0]} documents; "
            "give one label per run of document_ids, in row-major order"
        )
    if not r_drop or keys is None:
        return Loss(entropy(logits), counted.sum())
    again = model(batch.tokens, batch.document_ids, dropout_keys=keys ^ SECOND).float()
    apart = divergence(logits[counted], again[counted], None if batch.weights is None else batch.weights[counted])
    return Loss((entropy(logits) + entropy(again) + r_drop * apart / 2) / 2, counted.sum())
