"""What a classifier chose for each row, beside the truth, and the two numbers that follow from the choice alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import SupportsFloat

import numpy as np
from jaxtyping import Float, Int, Int64, Shaped
from sklearn.metrics import confusion_matrix

Targets = Int64[np.ndarray, " n"]
Probabilities = Float[np.ndarray, "n n_labels"]

DIGITS = 6
"""Scores are rounded, so that a last bit that depends on the number of threads does not reach a file."""


@dataclass(frozen=True)
class Labelling:
    """What a classifier chose: `targets` and `predicted` are numbers of classes below `n_labels`, one per row."""

    targets: Targets
    predicted: Targets
    n_labels: int

    @cached_property
    def confusion(self) -> Int[np.ndarray, "n_labels n_labels"]:
        """Rows by truth, columns by prediction."""
        return confusion_matrix(self.targets, self.predicted, labels=np.arange(self.n_labels))

    @property
    def accuracy(self) -> float:
        return float((self.targets == self.predicted).mean())

    @property
    def macro_f1(self) -> float:
        hits, truth, guesses = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)
        return float(macro_f1(hits[None], truth[None], guesses[None])[0])

    def of(self, rows: Shaped[np.ndarray, " rows"] | Sequence[int]) -> "Labelling":
        """The same choices for some of the rows, given by number or by mask."""
        return Labelling(self.targets[rows], self.predicted[rows], self.n_labels)


def macro_f1(
    hits: Shaped[np.ndarray, "sets n_labels"],
    truth: Shaped[np.ndarray, "sets n_labels"],
    guesses: Shaped[np.ndarray, "sets n_labels"],
) -> Float[np.ndarray, " sets"]:
    """Per set of counts: the mean F1 of the classes that occur in the truth or in the guesses (scikit-learn's way)."""
    occur = truth + guesses
    f1 = 2 * hits / np.maximum(occur, 1)
    return f1.sum(axis=1) / (occur > 0).sum(axis=1)


def rounded(value: SupportsFloat) -> float:
    """A number as files keep it."""
    return round(float(value), DIGITS)
