import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from pipeline import metrics
from pipeline.labelling import Labelling

NAMES = ["a", "b", "c", "d"]


def labelling(targets: list[int], predicted: list[int], n_labels: int = 4) -> Labelling:
    return Labelling(np.array(targets), np.array(predicted), n_labels)


def sampled(n: int, n_labels: int, seed: int = 0, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and targets drawn from them: perfectly calibrated while `sharpness` is 1."""
    draw = np.random.default_rng(seed)
    table = draw.dirichlet(np.full(n_labels, 0.4), size=n)
    targets = (table.cumsum(axis=1) < draw.random((n, 1))).sum(axis=1).clip(max=n_labels - 1)
    powers = table**sharpness
    return targets, (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
@settings(deadline=None)
def test_accuracy_and_macro_f1_are_scikit_learns(pairs: list[tuple[int, int]]):
    truth, guess = map(list, zip(*pairs, strict=True))
    ours = labelling(truth, guess)
    assert ours.accuracy == pytest.approx(accuracy_score(truth, guess))
    assert ours.macro_f1 == pytest.approx(f1_score(truth, guess, average="macro", zero_division=0))


def test_a_small_case_computed_by_hand():
    targets = np.array([0, 0, 1, 2])
    table = np.array([[0.7, 0.2, 0.1], [0.2, 0.6, 0.2], [0.1, 0.9, 0.0], [0.25, 0.25, 0.5]], dtype=np.float32)
    scores = metrics.score(targets, table, ["x", "y", "z"], resamples=100)
    assert scores.accuracy == 0.75
    assert [row.f1 for row in scores.per_class] == [0.666667, 0.666667, 1.0]
    assert scores.per_class[0].precision == 1.0
    assert scores.per_class[0].recall == 0.5
    assert scores.log_loss == pytest.approx(-np.log([0.7, 0.2, 0.9, 0.5]).mean(), abs=1e-6)
    assert scores.brier == pytest.approx((0.14 + 1.04 + 0.02 + 0.375) / 4, abs=1e-6)
    assert scores.ece == pytest.approx((0.3 + 0.6 + 0.1 + 0.5) / 4, abs=1e-6)


def test_a_class_without_test_rows_is_shown_but_not_averaged():
    targets, table = np.array([0, 1]), np.eye(3, dtype=np.float32)[[0, 1]]
    scores = metrics.score(targets, table, ["x", "y", "unseen"], resamples=100)
    assert scores.macro_f1 == 1.0
    assert scores.per_class[2].support == 0
    assert scores.per_class[2].f1 == 0.0


def test_the_bins_hold_every_row_and_average_to_the_accuracy():
    targets, table = sampled(500, 4)
    bins = metrics.calibration_bins(targets, table)
    assert [b.low for b in bins[1:]] == [b.high for b in bins[:-1]]
    assert sum(b.count for b in bins) == 500
    assert sum(b.count * b.accuracy for b in bins) / 500 == pytest.approx((table.argmax(1) == targets).mean(), abs=1e-5)


@given(st.floats(0.0, 1.0))
@settings(deadline=None)
def test_every_confidence_falls_into_the_bin_that_says_so(p: float):
    table = np.array([[p, 1 - p]])
    (full,) = [b for b in metrics.calibration_bins(np.array([0]), table) if b.count]
    assert full.low - 1e-6 <= table.max() <= full.high + 1e-6


def test_a_calibrated_classifier_has_a_small_ece_and_an_overconfident_one_a_large_one():
    assert metrics.score(*sampled(20_000, 5), list("abcde"), resamples=100).ece < 0.015
    assert metrics.score(*sampled(20_000, 5, sharpness=4), list("abcde"), resamples=100).ece > 0.1


@pytest.mark.parametrize("sharpness", [0.5, 1, 3])
def test_the_temperature_finds_how_overconfident_a_classifier_is(sharpness: float):
    targets, table = sampled(20_000, 5, sharpness=sharpness)
    t = metrics.temperature(targets, table)
    assert t == pytest.approx(sharpness, rel=0.08)
    fresh_targets, fresh = sampled(20_000, 5, seed=1, sharpness=sharpness)
    assert metrics.calibration(fresh_targets, metrics.with_temperature(fresh, t))["ece"] < 0.015
    assert (metrics.with_temperature(fresh, t).argmax(1) == fresh.argmax(1)).all()


def test_calibrated_and_uncalibrated_scores_stand_side_by_side():
    targets, table = sampled(5000, 4, sharpness=3)
    t = metrics.temperature(targets, table)
    scores = metrics.score(targets, table, NAMES, t=t, resamples=100)
    assert scores.temperature == t
    assert {k: getattr(scores, k) for k in scores.calibrated} == metrics.calibration(targets, table)
    assert scores.calibrated == metrics.calibration(targets, metrics.with_temperature(table, t))
    for name in ("log_loss", "brier", "ece"):
        assert scores.calibrated[name] < getattr(scores, name)
    assert sum(b.count for b in scores.calibrated_bins) == 5000
    plain = metrics.score(targets, table, NAMES, resamples=100)
    assert plain.temperature == 1
    assert plain.calibrated["log_loss"] == pytest.approx(plain.log_loss, abs=1e-5)


def test_a_few_rows_that_are_all_right_or_all_wrong_give_no_certainty():
    right = np.array([[0.7, 0.3]] * 5)
    t = metrics.temperature(np.zeros(5, int), right)
    assert metrics.with_temperature(right, t).max() == pytest.approx(6 / 7, abs=1e-4)
    wrong = metrics.temperature(np.ones(50, int), np.array([[0.99, 0.01]] * 50))
    assert wrong == pytest.approx(np.exp(3), rel=1e-5)


def test_areas_stand_beside_the_other_scores_and_miss_where_they_are_not_defined():
    targets, table = sampled(500, 4)
    scores = metrics.score(targets, table, NAMES, resamples=100)
    areas = [row.roc_auc for row in scores.per_class]
    assert scores.roc_auc == pytest.approx(np.mean([a for a in areas if a is not None]), abs=1e-6)
    alone = metrics.score(np.array([0, 0]), np.eye(2, dtype=np.float32)[[0, 1]], ["x", "y"], resamples=100)
    assert (alone.roc_auc, alone.average_precision, alone.per_class[0].roc_auc) == (None, None, None)


def test_probabilities_of_zero_and_one_are_scored():
    targets, table = np.array([0, 1]), np.eye(2, dtype=np.float32)[[0, 0]]
    scores = metrics.score(targets, table, ["x", "y"], resamples=100)
    assert np.isfinite(scores.log_loss)
    assert np.isfinite(metrics.temperature(targets, table))
