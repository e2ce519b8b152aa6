"""What is true of each text, and what is answered: one class, or any number of them (multi-label).

Targets are int64 [n], the number of each text's class. Where a text may have several classes, or none, they are int64
[n, n_labels]: 1 for each class that it has, 0 for the others. Answers have the form of the targets, and what follows
from that form is here, so that scores, baselines and pages need not ask.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

Targets = Int64[np.ndarray, " n"] | Int64[np.ndarray, "n n_labels"]
Probabilities = Float[np.ndarray, "n n_labels"]

LIKELY = 0.5
"""The probability from which on a class is answered where there may be several."""


def is_multi_label(targets: Targets) -> bool:
    return targets.ndim == 2


def encode(labels: Sequence[Any], names: Sequence[str], *, multi_label: bool) -> Targets:
    """Targets out of names: a class a text or, with `multi_label`, a sequence of classes. All must be in `names`."""
    number = {name: i for i, name in enumerate(names)}
    if not multi_label:
        return np.array([number[label] for label in labels], dtype=np.int64)
    targets = np.zeros((len(labels), len(names)), dtype=np.int64)
    for row, classes in zip(targets, labels, strict=True):
        row[[number[name] for name in classes]] = 1
    return targets


def decode(targets: Targets, names: Sequence[str]) -> list[Any]:
    """The name of each text's class; of several, a list of names a text."""
    if not is_multi_label(targets):
        return [names[target] for target in targets]
    return [[names[i] for i in np.flatnonzero(row).tolist()] for row in targets]


def shown(label: str | Sequence[str], separator: str = ", ") -> str:
    """The class or the classes of one text, as one string."""
    return label if isinstance(label, str) else separator.join(label)


def members(targets: Targets, n_labels: int) -> Bool[np.ndarray, "n n_labels"]:
    """Which classes each text has."""
    if is_multi_label(targets):
        return targets.astype(bool)
    found = np.zeros((len(targets), n_labels), dtype=bool)
    found[np.arange(len(targets)), targets] = True
    return found


def answered(probabilities: Probabilities, *, multi_label: bool) -> Targets:
    """The most probable class of each text; with `multi_label` each class that is at least as likely as not."""
    return (probabilities >= LIKELY).astype(np.int64) if multi_label else probabilities.argmax(axis=1)


def confidence(probabilities: Probabilities, *, multi_label: bool) -> Float[np.ndarray, " n"]:
    """How probable it is that the answer is right; of several classes, that all are, were they independent."""
    if multi_label:
        return np.maximum(probabilities, 1 - probabilities).prod(axis=1)
    return probabilities.max(axis=1)


def right(targets: Targets, predicted: Targets) -> Bool[np.ndarray, " n"]:
    """Which texts have the right answer; of several classes, all of them."""
    same = targets == predicted
    return same.all(axis=1) if is_multi_label(targets) else same


def coded(
    columns: Sequence[Targets], n_labels: int
) -> tuple[Int64[np.ndarray, "columns n"], Float[np.ndarray, "answers n_labels"]]:
    """The columns with a number for each distinct answer, and the classes that each such answer stands for."""
    if not is_multi_label(columns[0]):
        return np.stack(columns), np.eye(n_labels)
    sets, numbers = np.unique(np.concatenate(columns), axis=0, return_inverse=True)
    return numbers.reshape(len(columns), -1), sets.astype(np.float64)


def questions(targets: Targets, probabilities: Probabilities) -> tuple[Targets, Probabilities]:
    """Each text with each class as a question of its own, with the classes no and yes.

    Where a text has one class it is one question already, and comes back as it is.
    """
    if not is_multi_label(targets):
        return targets, probabilities
    yes = probabilities.ravel()
    return targets.ravel(), np.stack([1 - yes, yes], axis=1)
