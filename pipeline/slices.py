"""Where a classifier is good and where it is not: by the length of the text, and by what is taken for what."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

from pipeline.bootstrap import RESAMPLES, Interval, intervals
from pipeline.labelling import Labelling, rounded

MOST_CONFUSIONS = 20

Lengths = Int64[np.ndarray, " n"]
Confidence = Float[np.ndarray, " n"]
Rows = Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class Slice:
    """The scores of some of the rows. `confidence` is the mean probability of the class that is answered."""

    name: str
    n: int
    accuracy: float
    accuracy_ci: Interval
    macro_f1: float
    macro_f1_ci: Interval
    confidence: float


@dataclass(frozen=True)
class Confusion:
    """Texts of one class that are taken for another: how many, of how many; and the one it is surest of."""

    label: str
    predicted: str
    count: int
    share: float
    example: str


@dataclass(frozen=True)
class Slicing:
    """Scores any part of one labelling, all with the same resampling."""

    labelling: Labelling
    confidence: Confidence
    resamples: int = RESAMPLES
    seed: int = 0

    def part(self, name: str, rows: Rows) -> Slice | None:
        """The scores of the rows that a mask chooses; None if these are none."""
        if not rows.any():
            return None
        chosen = self.labelling.of(rows)
        accuracy_ci, macro_f1_ci = intervals(chosen, resamples=self.resamples, seed=self.seed)
        return Slice(
            name=name,
            n=int(rows.sum()),
            accuracy=rounded(chosen.accuracy),
            accuracy_ci=accuracy_ci,
            macro_f1=rounded(chosen.macro_f1),
            macro_f1_ci=macro_f1_ci,
            confidence=rounded(self.confidence[rows].mean()),
        )

    def by_length(self, lengths: Lengths, longest: int) -> list[Slice]:
        """Quarters of the rows from the shortest texts to the longest, in tokens; and those whose end is cut off.

        Texts of one length stay together, so the quarters are not quite equal, and few lengths make fewer parts.
        """
        edges = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75, 1], method="inverted_cdf"))
        parts = [
            self.part(_between(lengths, low, high), (lengths > low) & (lengths <= high))
            for low, high in zip([-1, *edges[:-1]], edges, strict=True)
        ]
        cut = self.part(f"cut off after {longest:,} tokens", lengths > longest)
        return [part for part in (*parts, cut) if part]


def _between(lengths: Lengths, low: Any, high: Any) -> str:
    inside = lengths[(lengths > low) & (lengths <= high)]
    first, last = int(inside.min()), int(inside.max())
    return f"{first:,} to {last:,} tokens" if first < last else f"{first:,} tokens"


def confusions(
    labelling: Labelling, confidence: Confidence, texts: Sequence[str], names: Sequence[str]
) -> list[Confusion]:
    """The pairs of classes that are most often confused, by the number of texts."""
    counts = labelling.confusion * ~np.eye(labelling.n_labels, dtype=bool)
    order = np.argsort(-counts, axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = zip(*np.unravel_index(order, counts.shape), strict=True)
    return [
        _confusion(labelling, confidence, texts, names, int(truth), int(guess))
        for truth, guess in pairs
        if counts[truth, guess]
    ]


def _confusion(
    labelling: Labelling, confidence: Confidence, texts: Sequence[str], names: Sequence[str], truth: int, guess: int
) -> Confusion:
    rows = np.flatnonzero((labelling.targets == truth) & (labelling.predicted == guess)).tolist()
    surest = min(rows, key=lambda row: (-confidence[row], texts[row]))
    of_class = int(labelling.confusion[truth].sum())
    return Confusion(names[truth], names[guess], len(rows), rounded(len(rows) / of_class), texts[surest])
