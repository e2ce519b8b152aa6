"""How good a classifier is: scores with their intervals, and calibration. Equal inputs give equal numbers.

Macro averages run over the classes that occur in the truth or in the predictions, scikit-learn's convention.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from scipy.optimize import brentq, minimize_scalar
from sklearn.metrics import brier_score_loss, log_loss, precision_recall_fscore_support

from pipeline.bootstrap import RESAMPLES, Interval, intervals
from pipeline.curves import Curves, one_vs_rest
from pipeline.labelling import Labelling, rounded
from pipeline.targets import Probabilities, Targets, is_multi_label, questions

N_BINS = 15

TEMPERATURES = (-3.0, 3.0)
"""The lowest and the highest log T."""


@dataclass(frozen=True)
class ClassScore:
    """One class against all others. A ratio whose denominator is 0 is 0. `support` is its rows in the truth.

    `roc_auc` and `average_precision` are None where every row is of the class, or none is.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    roc_auc: float | None
    average_precision: float | None


@dataclass(frozen=True)
class Bin:
    """The predictions whose confidence is in (low, high]: how many, how sure on average, how often right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Scores:
    """A classifier on `n` rows. Log loss in nats; Brier as a sum over classes, 0 to 2; ECE over bins of equal width.

    `log_loss`, `brier`, `ece` and `bins` are of the probabilities as the network gives them, `calibrated` and
    `calibrated_bins` of softmax(log p / temperature). `roc_auc` and `average_precision` are of the latter too: the
    mean of the classes that have them, or None.

    Where a row may have several classes, accuracy is the share of rows with all of them right; log loss, Brier (0 to 1)
    and ECE are over all rows and classes, each pair a question with the answer yes or no.
    """

    n: int
    accuracy: float
    accuracy_ci: Interval
    macro_f1: float
    macro_f1_ci: Interval
    log_loss: float
    brier: float
    ece: float
    temperature: float
    calibrated: dict[str, float]
    roc_auc: float | None
    average_precision: float | None
    per_class: list[ClassScore]
    bins: list[Bin]
    calibrated_bins: list[Bin]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return asdict(self)


def score(
    targets: Targets,
    probabilities: Probabilities,
    names: Sequence[str],
    *,
    t: float = 1.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Scores:
    """Everything about one classifier. Row i of `probabilities` belongs to `targets[i]`, column j to `names[j]`."""
    labelling = Labelling.of_probabilities(targets, probabilities)
    accuracy_ci, macro_f1_ci = intervals(labelling, resamples=resamples, seed=seed)
    served = with_temperature(probabilities, t, multi_label=is_multi_label(targets))
    curves = one_vs_rest(targets, served, names)
    return Scores(
        n=len(targets),
        accuracy=rounded(labelling.accuracy),
        accuracy_ci=accuracy_ci,
        macro_f1=rounded(labelling.macro_f1),
        macro_f1_ci=macro_f1_ci,
        **calibration(targets, probabilities),
        temperature=t,
        calibrated=calibration(targets, served),
        roc_auc=curves.macro_roc and curves.macro_roc.area,
        average_precision=curves.macro_precision_recall and curves.macro_precision_recall.area,
        per_class=class_scores(labelling, names, curves),
        bins=calibration_bins(targets, probabilities),
        calibrated_bins=calibration_bins(targets, served),
    )


def calibration(targets: Targets, probabilities: Probabilities) -> dict[str, float]:
    """`{"log_loss", "brier", "ece"}`: how far the probabilities can be believed."""
    answers, exact = questions(targets, probabilities.astype(np.float64))
    columns, half = np.arange(exact.shape[1]), is_multi_label(targets)
    exact /= exact.sum(axis=1, keepdims=True)  # float32 rows sum to 1 only nearly
    return {
        "log_loss": rounded(log_loss(answers, exact, labels=columns)),
        "brier": rounded(brier_score_loss(answers, exact, labels=columns, scale_by_half=half)),  # pyright: ignore[reportArgumentType]
        "ece": rounded(expected_calibration_error(calibration_bins(answers, exact))),
    }


def class_scores(labelling: Labelling, names: Sequence[str], curves: Curves) -> list[ClassScore]:
    """Precision, recall, F1, support and the areas under the curves of every class, in the order of `names`."""
    columns = precision_recall_fscore_support(
        labelling.targets,
        labelling.predicted,
        labels=np.arange(len(names)),
        zero_division=0,  # pyright: ignore[reportArgumentType]
    )
    roc, average_precision = ({c.name: c.area for c in kind} for kind in (curves.roc, curves.precision_recall))
    return [
        ClassScore(
            name=name,
            precision=rounded(precision),
            recall=rounded(recall),
            f1=rounded(f1),
            support=int(support),
            roc_auc=roc.get(name),
            average_precision=average_precision.get(name),
        )
        for name, (precision, recall, f1, support) in zip(names, np.array(columns).T, strict=True)
    ]


def calibration_bins(targets: Targets, probabilities: Probabilities, n_bins: int = N_BINS) -> list[Bin]:
    """The rows by their highest probability, in bins of equal width; an empty bin has confidence and accuracy 0.

    Where a row may have several classes, each row with each class by the probability of the answer, yes or no.
    """
    targets, probabilities = questions(targets, probabilities)
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == targets
    bin_of = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    counts = np.bincount(bin_of, minlength=n_bins)
    mean_confidence, accuracy = (
        np.bincount(bin_of, weights=values, minlength=n_bins) / np.maximum(counts, 1) for values in (confidence, right)
    )
    edges = np.arange(n_bins + 1) / n_bins
    columns = zip(edges[:-1], edges[1:], counts, mean_confidence, accuracy, strict=True)
    return [
        Bin(rounded(low), rounded(high), int(n), rounded(mean), rounded(hits)) for low, high, n, mean, hits in columns
    ]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """The mean distance between confidence and accuracy, bins weighted by their rows (Guo et al. 2017)."""
    return sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / sum(b.count for b in bins)


def temperature(targets: Targets, probabilities: Probabilities) -> float:
    """The T at which softmax(log p / T) is on average as sure as it is right. Fit it on rows that are not scored.

    This is "expectation consistency" (Clarte et al. 2023). On twelve classifiers of six tasks it left a mean test ECE
    of .036, the T of the lowest log loss (Guo et al. 2017) .039, at the same log loss. The accuracy it aims at is
    (hits + 1) / (rows + 2), so that a few rows that are all right do not make it certain. T is within e^-3 and e^3.
    Where a row may have several classes, it is the T of the lowest log loss over all rows and classes: the answer to
    most of them is an easy no, which an average would be about.
    """
    if is_multi_label(targets):
        return _likeliest(*questions(targets, probabilities))
    hits = int((probabilities.argmax(axis=1) == targets).sum())
    accuracy = (hits + 1) / (len(targets) + 2)

    def excess(log_t: float) -> float:
        return float(with_temperature(probabilities, np.exp(log_t)).max(axis=1).mean()) - accuracy

    low, high = TEMPERATURES
    if excess(low) <= 0 or excess(high) >= 0:
        return rounded(np.exp(low if excess(low) <= 0 else high))
    best: Any = brentq(excess, low, high, xtol=1e-6)
    return rounded(np.exp(best))


def calibrated_log_loss(targets: Targets, probabilities: Probabilities) -> float:
    """Nats a row at the temperature that fits these very rows: how good the answers are, however sure they were.

    NaN without rows.
    """
    if not len(targets):
        return float("nan")
    t = temperature(targets, probabilities)
    return calibration(targets, with_temperature(probabilities, t, multi_label=is_multi_label(targets)))["log_loss"]


def validated(targets: Targets, probabilities: Probabilities) -> dict[str, float]:
    """`{"macro_f1", "accuracy", "log_loss"}` by which classifiers are chosen, the last calibrated; NaN without rows."""
    labelling = Labelling.of_probabilities(targets, probabilities)
    loss = calibrated_log_loss(targets, probabilities)
    return {"macro_f1": labelling.macro_f1, "accuracy": labelling.accuracy, "log_loss": loss}


def _likeliest(answers: Targets, probabilities: Probabilities) -> float:
    """The T of the lowest log loss of questions that are answered no (0) or yes (1).

    The targets are Platt's (1999): (yes + 1) / (yes + 2) in place of 1, 1 / (no + 2) in place of 0, so that a few
    answers that are all right do not make it certain.
    """
    yes = int(answers.sum())
    wanted = np.where(answers == 1, (yes + 1) / (yes + 2), 1 / (len(answers) - yes + 2))
    no, for_yes = np.log(_above_zero(probabilities)).T
    odds = for_yes - no

    def loss(log_t: float) -> float:
        scaled = odds / np.exp(log_t)
        return float((np.logaddexp(0, scaled) - wanted * scaled).mean())

    best: Any = minimize_scalar(loss, bounds=TEMPERATURES, method="bounded", options={"xatol": 1e-6})
    return rounded(np.exp(best.x))


def with_temperature(probabilities: Probabilities, t: float, *, multi_label: bool = False) -> Probabilities:
    """softmax(log p / t), float64. With `multi_label` that of each class alone, against its absence."""
    if multi_label:
        return _softmax(np.stack([1 - probabilities, probabilities], axis=-1), t)[..., 1]
    return _softmax(probabilities, t)


def _softmax(probabilities: Shaped[np.ndarray, "... n"], t: float) -> Float[np.ndarray, "... n"]:
    scaled = np.log(_above_zero(probabilities)) / t
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _above_zero(probabilities: Shaped[np.ndarray, "... n"]) -> Float[np.ndarray, "... n"]:
    return np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny)
