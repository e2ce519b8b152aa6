"""What a classifier chose for each row, beside the truth, and the two numbers that follow from the choice alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import SupportsFloat

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from sklearn.metrics import confusion_matrix

from pipeline.targets import Probabilities, Targets, answered, is_multi_label, right

Counts = tuple[Int[np.ndarray, " n_labels"], Int[np.ndarray, " n_labels"], Int[np.ndarray, " n_labels"]]

DIGITS = 6
"""Scores are rounded, so that a last bit that depends on the number of threads does not reach a file."""


@dataclass(frozen=True)
class Labelling:
    """What a classifier chose, of `n_labels` classes: `targets` and `predicted` as `pipeline.targets` has them."""

    targets: Targets
    predicted: Targets
    n_labels: int

    @classmethod
    def of_probabilities(cls, targets: Targets, probabilities: Probabilities) -> "Labelling":
        """What is answered at these probabilities, in the form of the targets."""
        predicted = answered(probabilities, multi_label=is_multi_label(targets))
        return cls(targets, predicted, probabilities.shape[1])

    @cached_property
    def confusion(self) -> Int[np.ndarray, "n_labels n_labels"]:
        """Rows by truth, columns by prediction; only where each row has one class."""
        return confusion_matrix(self.targets, self.predicted, labels=np.arange(self.n_labels))

    @property
    def right(self) -> Bool[np.ndarray, " n"]:
        return right(self.targets, self.predicted)

    @property
    def accuracy(self) -> float:
        """The share of rows that are right; where they have several classes, all of them (subset accuracy).

        NaN without rows.
        """
        return float(self.right.mean()) if len(self.targets) else float("nan")

    @property
    def macro_f1(self) -> float:
        """NaN without rows."""
        if not len(self.targets):
            return float("nan")
        hits, truth, guesses = self._counts
        return float(macro_f1(hits[None], truth[None], guesses[None])[0])

    @property
    def micro_f1(self) -> float:
        """The F1 of all classes counted together; where each row has one, this is the accuracy."""
        hits, truth, guesses = (counts.sum() for counts in self._counts)
        return float(2 * hits / (truth + guesses)) if truth + guesses else 1.0

    @property
    def _counts(self) -> Counts:
        """Of each class the rows where it was rightly chosen, those that have it, and those where it was chosen."""
        if is_multi_label(self.targets):
            return (self.targets & self.predicted).sum(0), self.targets.sum(0), self.predicted.sum(0)
        return self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)

    def of(self, rows: Shaped[np.ndarray, " rows"] | Sequence[int]) -> "Labelling":
        """The same choices for some of the rows, given by number or by mask."""
        return Labelling(self.targets[rows], self.predicted[rows], self.n_labels)


def macro_f1(
    hits: Shaped[np.ndarray, "sets n_labels"],
    truth: Shaped[np.ndarray, "sets n_labels"],
    guesses: Shaped[np.ndarray, "sets n_labels"],
) -> Float[np.ndarray, " sets"]:
    """Per set of counts: the mean F1 of the classes that occur in the truth or in the guesses (scikit-learn's way).

    1 where none occurs: rows without a class, of which none was chosen.
    """
    occur = truth + guesses
    f1, n = (2 * hits / np.maximum(occur, 1)).sum(axis=1), (occur > 0).sum(axis=1)
    return np.where(n, f1 / np.maximum(n, 1), 1.0)


def rounded(value: SupportsFloat) -> float:
    """A number as files keep it."""
    return round(float(value), DIGITS)
