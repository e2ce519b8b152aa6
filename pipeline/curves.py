"""One class against the rest: ROC and precision-recall curves, and what is gained by leaving unsure answers out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from pipeline.labelling import Labelling, rounded
from pipeline.targets import Probabilities, Targets, confidence, is_multi_label, members

THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Confidences below which an answer may be withheld."""

CUTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Probabilities of the positive class from which on a text is called positive."""

GRID = 201
"""Points of an averaged curve."""

MEAN = "mean of the classes"

Scores = Float[np.ndarray, " n"]
Points = Float[np.ndarray, " points"]


@dataclass(frozen=True)
class Curve:
    """A line from x=0 to x=1, and its area: ROC-AUC, or average precision. `name` is a class, or what is averaged."""

    name: str
    x: Points
    y: Points
    area: float


@dataclass(frozen=True)
class Curves:
    """The curves of every class that has texts of its own and of others, and their unweighted mean, if any has."""

    roc: list[Curve]
    precision_recall: list[Curve]
    macro_roc: Curve | None
    macro_precision_recall: Curve | None


@dataclass(frozen=True)
class Threshold:
    """What is left when answers less sure than `threshold` are withheld: their share, and how good the rest are.

    `accuracy` and `macro_f1` are None where nothing is left.
    """

    threshold: float
    n: int
    coverage: float
    accuracy: float | None
    macro_f1: float | None


@dataclass(frozen=True)
class Cut:
    """Two classes: the positive one is answered from this probability of it on. `flagged` is the share that gets it."""

    threshold: float
    flagged: float
    precision: float
    recall: float
    f1: float


def one_vs_rest(targets: Targets, probabilities: Probabilities, names: Sequence[str]) -> Curves:
    """Both curves of every class, its texts ranked by the probability of that class."""
    positive = members(targets, len(names))
    known = [i for i in range(len(names)) if 0 < positive[:, i].sum() < len(targets)]
    ranked = [(names[i], positive[:, i], probabilities[:, i].astype(np.float64)) for i in known]
    rocs, precisions = [roc(*one) for one in ranked], [precision_recall(*one) for one in ranked]
    return Curves(rocs, precisions, _mean(rocs, _on_the_line), _mean(precisions, _next_point))


def roc(name: str, positive: Bool[np.ndarray, " n"], scores: Scores) -> Curve:
    """x: share of the others that is called positive; y: share of the positive. Both kinds must occur."""
    false_rate, true_rate, _ = roc_curve(positive, scores)
    return Curve(name, false_rate, true_rate, rounded(roc_auc_score(positive, scores)))


def precision_recall(name: str, positive: Bool[np.ndarray, " n"], scores: Scores) -> Curve:
    """x: recall; y: precision; area: average precision, a sum of steps without interpolation."""
    precision, recall, _ = precision_recall_curve(positive, scores, drop_intermediate=True)
    return Curve(name, recall[::-1], precision[::-1], rounded(average_precision_score(positive, scores)))


def _mean(curves: Sequence[Curve], heights: Callable[[Points, Curve], Points]) -> Curve | None:
    if not curves:
        return None
    grid = np.linspace(0, 1, GRID)
    mean = np.mean([heights(grid, curve) for curve in curves], axis=0)
    return Curve(MEAN, grid, mean, rounded(np.mean([curve.area for curve in curves])))


def _on_the_line(grid: Points, curve: Curve) -> Points:
    return np.interp(grid, curve.x, curve.y)


def _next_point(grid: Points, curve: Curve) -> Points:
    """Between two points of a precision-recall curve a straight line would promise too much (Davis, Goadrich 2006)."""
    return curve.y[np.searchsorted(curve.x, grid)]


def thresholds(targets: Targets, probabilities: Probabilities) -> list[Threshold]:
    """What each of THRESHOLDS would do. One that withholds nothing more than the one before it is left out."""
    sure = confidence(probabilities, multi_label=is_multi_label(targets))
    everything = Labelling.of_probabilities(targets, probabilities)
    kept = {threshold: sure >= threshold for threshold in THRESHOLDS}
    rows = [_threshold(everything, threshold, rows) for threshold, rows in kept.items()]
    return [row for place, row in enumerate(rows) if not place or row.n < rows[place - 1].n]


def _threshold(everything: Labelling, threshold: float, rows: Bool[np.ndarray, " n"]) -> Threshold:
    n = int(rows.sum())
    left = everything.of(rows)
    return Threshold(
        threshold=threshold,
        n=n,
        coverage=rounded(n / len(rows)),
        accuracy=rounded(left.accuracy) if n else None,
        macro_f1=rounded(left.macro_f1) if n else None,
    )


def cuts(targets: Targets, probabilities: Probabilities) -> list[Cut]:
    """Two classes: what calling a text positive from each of CUTS on would do. The positive class is number 1."""
    assert probabilities.shape[1] == 2, "only one of two classes can be the positive one"
    return [_cut(targets == 1, probabilities[:, 1] >= cut, cut) for cut in CUTS]


def _cut(positive: Bool[np.ndarray, " n"], flagged: Bool[np.ndarray, " n"], threshold: float) -> Cut:
    hits, n_flagged, n_positive = int((positive & flagged).sum()), int(flagged.sum()), int(positive.sum())
    return Cut(
        threshold=threshold,
        flagged=rounded(n_flagged / len(positive)),
        precision=rounded(hits / max(n_flagged, 1)),
        recall=rounded(hits / max(n_positive, 1)),
        f1=rounded(2 * hits / max(n_flagged + n_positive, 1)),
    )


def most_confident(targets: Targets, probabilities: Probabilities) -> Curve:
    """x: share of the texts that is answered, the surest first; y: how many of these answers are right; area: mean y.

    Answers that are equally sure are kept or withheld together.
    """
    sure = confidence(probabilities, multi_label=is_multi_label(targets))
    order = np.argsort(-sure, kind="stable")
    right = Labelling.of_probabilities(targets, probabilities).right[order]
    last = np.flatnonzero(np.append(np.diff(sure[order]) != 0, True))
    answered = last + 1
    accuracy = np.cumsum(right)[last] / answered
    steps = np.diff(answered, prepend=0) / len(targets)
    return Curve("accuracy", answered / len(targets), accuracy, rounded((accuracy * steps).sum()))
