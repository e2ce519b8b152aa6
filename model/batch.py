"""What a model is fed and what an objective answers: the two values that cross from data to training."""

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int, Int32, Int64
from torch import Tensor

IGNORE = -100
"""A target that no loss counts."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed rows of tokens. A document is a run of equal `document_ids` in a row; -1 is padding.

    `targets` is [rows, seq] for language modelling (IGNORE where there is none) and [n_documents] for classification,
    in row-major order of appearance; [n_documents, n_labels] where a document may have several labels, 1 for each that
    it has. `dropout_keys` holds one random number a row; None turns dropout off. `weights` say what the loss of each
    document counts in classification; None is 1 for all.
    """

    tokens: Int64[Tensor, "rows seq"]
    targets: Int64[Tensor, "rows seq"] | Int64[Tensor, " n_documents"] | Int64[Tensor, "n_documents n_labels"]
    document_ids: Int32[Tensor, "rows seq"]
    dropout_keys: Int64[Tensor, " rows"] | None = None
    weights: Float32[Tensor, " n_documents"] | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`; the copy does not block when this one lies in pinned memory."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        keys, weights = (None if x is None else move(x) for x in (self.dropout_keys, self.weights))
        return Batch(move(self.tokens), move(self.targets), move(self.document_ids), keys, weights)


@dataclass(frozen=True, eq=False)
class Loss:
    """A sum in nats, and how many targets it is over.

    The mean is left to the caller, who alone knows the count of the whole step: over all micro steps and all ranks.
    """

    sum: Float32[Tensor, ""]
    count: Int[Tensor, ""]
