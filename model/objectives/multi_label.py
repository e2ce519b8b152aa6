"""Multi-label classification: the binary cross-entropy of each label, whether a document has it or not."""

from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

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
    """`batch.targets` is [n_documents, n_labels], 1 where a document has the label; a row of IGNORE leaves one out.

    A document's loss is the mean over the labels, so that it stays the size of one label's; the count is one a
    document. With `label_smoothing` e the target is 1 - e/2 where the label is there and e/2 where it is not.
    `class_weights` multiply the loss of each label where it is there, `batch.weights` that of each document. `r_drop`
    and what is raised are those of `document_loss`.
    """
    counted = (batch.targets != IGNORE).all(dim=1)

    def entropy(logits: Float[Tensor, "n_documents n_labels"]) -> Tensor:
        weights = None if class_weights is None else class_weights.to(logits.device)
        wanted = batch.targets.clamp(min=0) * (1 - label_smoothing) + label_smoothing / 2
        losses = binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), pos_weight=weights, reduction="none")
        own = losses.mean(dim=1) * counted
        return (own if batch.weights is None else own * batch.weights).sum()

    return document_loss(model, batch, counted, entropy, divergence, r_drop)


def divergence(
    one: Float[Tensor, "n n_labels"], other: Float[Tensor, "n n_labels"], weights: Float32[Tensor, " n"] | None = None
) -> Float[Tensor, ""]:
    """The sum over rows of the labels' mean KL(p, q) + KL(q, p), in nats, each label being there or not.

    Of two such distributions with log-odds a and b this is (p - q) * (a - b).
    """
    apart = ((one.sigmoid() - other.sigmoid()) * (one - other)).mean(dim=1)
    return (apart if weights is None else apart * weights).sum()
