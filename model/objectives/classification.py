"""Classification: the cross-entropy of one label per document."""

from torch.nn.functional import cross_entropy

from model.batch import IGNORE, Batch, Loss
from model.heads import Classifier


def loss(model: Classifier, batch: Batch, label_smoothing: float = 0.0) -> Loss:
    """`batch.targets` is [n_documents], in row-major order of appearance; IGNORE leaves a document out.

    With `label_smoothing` e the target is (1 - e) on the label and e spread evenly over all labels (arXiv:1512.00567).
    Raises ValueError if the rows do not hold as many documents as there are targets.
    """
    logits = model(batch.tokens, batch.document_ids, dropout_keys=batch.dropout_keys)
    if logits.shape[:1] != batch.targets.shape:
        raise ValueError(
            f"targets has shape {tuple(batch.targets.shape)} but the rows hold {logits.shape[0]} documents; "
            "give one label per run of document_ids, in row-major order"
        )
    total = cross_entropy(
        logits.float(), batch.targets, reduction="sum", ignore_index=IGNORE, label_smoothing=label_smoothing
    )
    return Loss(total, (batch.targets != IGNORE).sum())
