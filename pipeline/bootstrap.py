"""How far scores may be chance: bootstrap intervals, paired comparisons, an exact test. Equal inputs, equal numbers.

Rows are resampled with replacement, 95 % intervals are percentiles (Efron and Tibshirani 1993, chapter 13). Two
classifiers are always scored on the same resamples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64
from scipy.stats import binomtest

from pipeline.labelling import Labelling, macro_f1, rounded
from pipeline.targets import Targets, coded

RESAMPLES = 1000
BLOCK = 500
"""Resamples in memory at a time."""


class Interval(NamedTuple):
    """Where 95 % of the bootstrap's resamples fall."""

    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Another labelling of the same rows, and by how much of macro-F1 ours leads. `lead_ci` above 0: not by chance.

    `p_value` is two-sided, of the hypothesis that neither leads: twice the smaller share of resamples in which the
    lead is on one side of 0, (k + 1) / (resamples + 1) each, at most 1. Where it is near .05, so is an end of `lead_ci`
    near 0, on either side.
    """

    accuracy: float
    accuracy_ci: Interval
    macro_f1: float
    macro_f1_ci: Interval
    lead: float
    lead_ci: Interval
    p_value: float

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return asdict(self)


def intervals(labelling: Labelling, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[Interval, Interval]:
    """Bootstrap intervals of accuracy and macro-F1."""
    columns = labelling.targets, labelling.predicted
    accuracies, f1s = _resampled(columns, labelling.n_labels, resamples, seed)
    return _interval(accuracies[0]), _interval(f1s[0])


def compare(ours: Labelling, theirs: Labelling, *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Score `theirs`, and bootstrap the difference of macro-F1 in pairs."""
    columns = ours.targets, ours.predicted, theirs.predicted
    accuracies, f1s = _resampled(columns, ours.n_labels, resamples, seed)
    leads = f1s[0] - f1s[1]
    return Comparison(
        accuracy=rounded(theirs.accuracy),
        accuracy_ci=_interval(accuracies[1]),
        macro_f1=rounded(theirs.macro_f1),
        macro_f1_ci=_interval(f1s[1]),
        lead=rounded(ours.macro_f1 - theirs.macro_f1),
        lead_ci=_interval(leads),
        p_value=rounded(_two_sided(leads)),
    )


def mcnemar(ours: Labelling, theirs: Labelling) -> float:
    """The p-value of McNemar's exact test that both are right equally often; 1 where they are right on the same rows.

    Only rows count that one got right and the other wrong; under the hypothesis either is as likely (McNemar 1947).
    """
    we, they = ours.right, theirs.right
    only_we, only_they = int((we & ~they).sum()), int((they & ~we).sum())
    return float(binomtest(only_we, only_we + only_they).pvalue) if only_we + only_they else 1.0


def _resampled(
    columns: Sequence[Targets], n_labels: int, resamples: int, seed: int
) -> tuple[Float[np.ndarray, "guesses resamples"], Float[np.ndarray, "guesses resamples"]]:
    """Accuracy and macro-F1 of every guess on every resample. The first of the columns is the truth."""
    outcomes, classes = coded(columns, n_labels)
    cells, counts = np.unique(outcomes, axis=1, return_counts=True)
    truth, guesses = cells[0], cells[1:]
    blocks = [
        np.array(
            [
                [_accuracies(draws, truth, guess) for guess in guesses],
                [_macro_f1s(draws, classes[truth], classes[guess]) for guess in guesses],
            ]
        )
        for draws in _draws(counts, resamples, seed)
    ]
    accuracies, f1s = np.concatenate(blocks, axis=2)
    return accuracies, f1s


def _draws(
    counts: Int64[np.ndarray, " cells"], resamples: int, seed: int
) -> Iterator[Float[np.ndarray, "block cells"]]:
    """How often each distinct outcome occurs in every resample, a block of them at a time.

    Drawing n rows with replacement and counting the outcomes is one multinomial draw over the outcomes, so a resample
    costs as much as there are distinct outcomes, however many rows there are.
    """
    generator, n = np.random.default_rng(seed), counts.sum()
    for first in range(0, resamples, BLOCK):
        yield generator.multinomial(n, counts / n, size=min(BLOCK, resamples - first)).astype(np.float64)


def _accuracies(draws: np.ndarray, truth: np.ndarray, guess: np.ndarray) -> np.ndarray:
    return draws[:, truth == guess].sum(axis=1) / draws.sum(axis=1)


def _macro_f1s(draws: np.ndarray, truth: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """`truth` and `guess` [cells, n_labels] are 1 for the classes of each cell."""
    return macro_f1(draws @ (truth * guess), draws @ truth, draws @ guess)


def _interval(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(rounded(low), rounded(high))


def _two_sided(leads: np.ndarray) -> float:
    below, above = ((1 + (side <= 0).sum()) / (1 + len(leads)) for side in (leads, -leads))
    return min(1.0, 2 * min(below, above))
