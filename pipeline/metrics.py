"""How good a classifier is: scores with their intervals, and calibration. Equal inputs give equal numbers.

Macro averages run over the classes that occur in the truth or in the predictions, scikit-learn's convention.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int64
from scipy.optimize import minimize_scalar
from sklearn.metrics import brier_score_loss, confusion_matrix, log_loss, precision_recall_fscore_support

Targets = Int64[np.ndarray, " n"]
Probabilities = Float[np.ndarray, "n n_labels"]

N_BINS = 15
DIGITS = 6
"""Scores are rounded, so that a last bit that depends on the number of threads does not reach a file."""

RESAMPLES = 1000


class Interval(NamedTuple):
    """Where 95 % of the bootstrap's resamples fall."""

    low: float
    high: float


@dataclass(frozen=True)
class ClassScore:
    """One class against all others. A ratio whose denominator is 0 is 0. `support` is its rows in the truth."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Bin:
    """The predictions whose confidence is in (low, high]: how many, how sure on average, how often right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


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
        return float(_macro_f1(hits[None], truth[None], guesses[None])[0])


@dataclass(frozen=True)
class Scores:
    """A classifier on `n` rows. Log loss in nats; Brier as a sum over classes, 0 to 2; ECE over bins of equal width."""

    n: int
    accuracy: float
    accuracy_ci: Interval
    macro_f1: float
    macro_f1_ci: Interval
    log_loss: float
    brier: float
    ece: float
    per_class: list[ClassScore]
    bins: list[Bin]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Another labelling of the same rows, and by how much of macro-F1 ours leads. `lead_ci` above 0: not by chance."""

    accuracy: float
    accuracy_ci: Interval
    macro_f1: float
    macro_f1_ci: Interval
    lead: float
    lead_ci: Interval

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return asdict(self)


def score(
    targets: Targets, probabilities: Probabilities, names: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> Scores:
    """Everything about one classifier. Row i of `probabilities` belongs to `targets[i]`, column j to `names[j]`."""
    labelling = Labelling(targets, probabilities.argmax(axis=1), len(names))
    accuracy_ci, macro_f1_ci = intervals(labelling, resamples=resamples, seed=seed)
    return Scores(
        n=len(targets),
        accuracy=_round(labelling.accuracy),
        accuracy_ci=accuracy_ci,
        macro_f1=_round(labelling.macro_f1),
        macro_f1_ci=macro_f1_ci,
        **calibration(targets, probabilities),
        per_class=class_scores(labelling, names),
        bins=calibration_bins(targets, probabilities),
    )


def calibration(targets: Targets, probabilities: Probabilities) -> dict[str, float]:
    """`{"log_loss", "brier", "ece"}`: how far the probabilities can be believed."""
    columns = np.arange(probabilities.shape[1])
    exact = probabilities.astype(np.float64)
    exact /= exact.sum(axis=1, keepdims=True)  # float32 rows sum to 1 only nearly
    return {
        "log_loss": _round(log_loss(targets, exact, labels=columns)),
        "brier": _round(brier_score_loss(targets, exact, labels=columns, scale_by_half=False)),  # pyright: ignore[reportArgumentType]
        "ece": _round(expected_calibration_error(calibration_bins(targets, exact))),
    }


def class_scores(labelling: Labelling, names: Sequence[str]) -> list[ClassScore]:
    """Precision, recall, F1 and support of every class, in the order of `names`."""
    columns = precision_recall_fscore_support(
        labelling.targets,
        labelling.predicted,
        labels=np.arange(len(names)),
        zero_division=0,  # pyright: ignore[reportArgumentType]
    )
    rows = np.array(columns).T
    return [
        ClassScore(name, _round(precision), _round(recall), _round(f1), int(support))
        for name, (precision, recall, f1, support) in zip(names, rows, strict=True)
    ]


def calibration_bins(targets: Targets, probabilities: Probabilities, n_bins: int = N_BINS) -> list[Bin]:
    """The rows by their highest probability, in bins of equal width; an empty bin has confidence and accuracy 0."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == targets
    bin_of = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    counts = np.bincount(bin_of, minlength=n_bins)
    mean_confidence, accuracy = (
        np.bincount(bin_of, weights=values, minlength=n_bins) / np.maximum(counts, 1) for values in (confidence, right)
    )
    edges = np.arange(n_bins + 1) / n_bins
    columns = zip(edges[:-1], edges[1:], counts, mean_confidence, accuracy, strict=True)
    return [Bin(_round(low), _round(high), int(n), _round(mean), _round(hits)) for low, high, n, mean, hits in columns]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """The mean distance between confidence and accuracy, bins weighted by their rows (Guo et al. 2017)."""
    return sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / sum(b.count for b in bins)


def temperature(targets: Targets, probabilities: Probabilities) -> float:
    """The T whose softmax(log p / T) has the lowest log loss (Guo et al. 2017). Fit it on rows that are not scored."""
    columns = np.arange(probabilities.shape[1])

    def loss(log_t: float) -> float:
        return log_loss(targets, with_temperature(probabilities, np.exp(log_t)), labels=columns)

    best: Any = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-4})
    return _round(np.exp(best.x))


def with_temperature(probabilities: Probabilities, t: float) -> Probabilities:
    """softmax(log p / t), float64."""
    scaled = np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny)) / t
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def intervals(labelling: Labelling, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[Interval, Interval]:
    """Bootstrap intervals of accuracy and macro-F1."""
    outcomes = np.stack([labelling.targets, labelling.predicted])
    (truth, guess), draws = _resamples(outcomes, resamples, seed)
    return _interval(_accuracies(draws, truth, guess)), _interval(_macro_f1s(draws, truth, guess, labelling.n_labels))


def compare(ours: Labelling, theirs: Labelling, *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Score `theirs`, and bootstrap the difference of macro-F1 in pairs: both are scored on the same resamples."""
    outcomes = np.stack([ours.targets, ours.predicted, theirs.predicted])
    (truth, our, their), draws = _resamples(outcomes, resamples, seed)
    our_f1, their_f1 = (_macro_f1s(draws, truth, guess, ours.n_labels) for guess in (our, their))
    return Comparison(
        accuracy=_round(theirs.accuracy),
        accuracy_ci=_interval(_accuracies(draws, truth, their)),
        macro_f1=_round(theirs.macro_f1),
        macro_f1_ci=_interval(their_f1),
        lead=_round(ours.macro_f1 - theirs.macro_f1),
        lead_ci=_interval(our_f1 - their_f1),
    )


def _resamples(
    outcomes: Int64[np.ndarray, "kinds n"], resamples: int, seed: int
) -> tuple[Int64[np.ndarray, "kinds cells"], Float[np.ndarray, "resamples cells"]]:
    """The distinct outcomes, and how often each occurs in every resample.

    Drawing n rows with replacement and counting the outcomes is one multinomial draw over the outcomes, so a resample
    costs as much as there are distinct outcomes, however many rows there are.
    """
    n = outcomes.shape[1]
    cells, counts = np.unique(outcomes, axis=1, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    return cells, draws.astype(np.float64)


def _accuracies(draws: np.ndarray, truth: np.ndarray, guess: np.ndarray) -> np.ndarray:
    return draws[:, truth == guess].sum(axis=1) / draws.sum(axis=1)


def _macro_f1s(draws: np.ndarray, truth: np.ndarray, guess: np.ndarray, n_labels: int) -> np.ndarray:
    truth_of, guess_of = (np.eye(n_labels)[labels] for labels in (truth, guess))
    return _macro_f1(draws @ (truth_of * guess_of), draws @ truth_of, draws @ guess_of)


def _macro_f1(hits: np.ndarray, truth: np.ndarray, guesses: np.ndarray) -> np.ndarray:
    """Per row of counts [resamples, n_labels]: the mean F1 of the classes that occur."""
    occur = truth + guesses
    f1 = 2 * hits / np.maximum(occur, 1)
    return f1.sum(axis=1) / (occur > 0).sum(axis=1)


def _interval(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(_round(low), _round(high))


def _round(value: float) -> float:
    return round(float(value), DIGITS)
