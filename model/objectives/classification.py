"""Classification: the cross-entropy of one label per document."""

from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from model.batch import IGNORE, Batch, Loss
from model.heads import Classifier
from model.objectives._readings import document_loss


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
    document. `r_drop` and what is raised are those of `document_loss`.
    """

    def entropy(logits: Float[Tensor, "n_documents n_labels"]) -> Tensor:
        weights = None if class_weights is None else class_weights.to(logits.device)
        reduction = "sum" if batch.weights is None else "none"
        losses = cross_entropy(
            logits, batch.targets, weights, reduction=reduction, ignore_index=IGNORE, label_smoothing=label_smoothing
        )
        return losses if batch.weights is None else (losses * batch.weights).sum()

    return document_loss(model, batch, batch.targets != IGNORE, entropy, divergence, r_drop)


def divergence(
    one: Float[Tensor, "n n_labels"], other: Float[Tensor, "n n_labels"], weights: Float32[Tensor, " n"] | None = None
) -> Float[Tensor, ""]:
    """The sum over rows of KL(p, q) + KL(q, p), in nats, of the distributions that two sets of logits stand for."""
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    if weights is not None:
        return ((p.exp() - q.exp()) * (p - q) * weights[:, None]).sum()
    return kl_div(p, q, reduction="sum", log_target=True) + kl_div(q, p, reduction="sum", log_target=True)
