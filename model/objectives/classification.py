"""Classification: the cross-entropy of one label per document."""

from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from model.batch import IGNORE, Batch, Loss
from model.heads import Classifier

SECOND = 0x5851F42D4C957F2D
"""Turns a row's dropout key into that of its second pass."""


def loss(
    model: Classifier,
    batch: Batch,
    label_smoothing: float = 0.0,
    class_weights: Float32[Tensor, " n_labels"] | None = None,
    r_drop: float = 0.0,
) -> Loss:
    """`batch.targets` is [n_documents], in row-major order of appearance; IGNORE leaves a document out.

    With `label_smoothing` e the target is (1 - e) on the label and e spread evenly over all labels (arXiv:1512.00567).
    `class_weights` multiply the loss of each label, `batch.weights` that of each document; the count stays one a
    document. With `r_drop` and dropout each
    document is read twice, with different dropout: this is half of equation 4 of R-Drop (arXiv:2106.14448), alpha being
    `r_drop`, so that it stays the size of one reading's loss.
    Raises ValueError if the rows do not hold as many documents as there are targets.
    """
    keys = batch.dropout_keys
    logits = model(batch.tokens, batch.document_ids, dropout_keys=keys).float()
    if logits.shape[:1] != batch.targets.shape:
        raise ValueError(
            f"targets has shape {tuple(batch.targets.shape)} but the rows hold {logits.shape[0]} documents; "
            "give one label per run of document_ids, in row-major order"
        )
    weights = None if class_weights is None else class_weights.to(logits.device)
    counted = batch.targets != IGNORE

    def entropy(logits: Float[Tensor, "n_documents n_labels"]) -> Tensor:
        reduction = "sum" if batch.weights is None else "none"
        losses = cross_entropy(
            logits, batch.targets, weights, reduction=reduction, ignore_index=IGNORE, label_smoothing=label_smoothing
        )
        return losses if batch.weights is None else (losses * batch.weights).sum()

    if not r_drop or keys is None:
        return Loss(entropy(logits), counted.sum())
    again = model(batch.tokens, batch.document_ids, dropout_keys=keys ^ SECOND).float()
    apart = divergence(logits[counted], again[counted], None if batch.weights is None else batch.weights[counted])
    return Loss((entropy(logits) + entropy(again) + r_drop * apart / 2) / 2, counted.sum())


def divergence(
    one: Float[Tensor, "n n_labels"], other: Float[Tensor, "n n_labels"], weights: Float32[Tensor, " n"] | None = None
) -> Float[Tensor, ""]:
    """The sum over rows of KL(p, q) + KL(q, p), in nats, of the distributions that two sets of logits stand for."""
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    if weights is not None:
        return ((p.exp() - q.exp()) * (p - q) * weights[:, None]).sum()
    return kl_div(p, q, reduction="sum", log_target=True) + kl_div(q, p, reduction="sum", log_target=True)
