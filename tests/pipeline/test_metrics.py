import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from pipeline import metrics
from pipeline.metrics import Labelling

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


def test_temperature_scaling_finds_how_overconfident_a_classifier_is():
    targets, table = sampled(20_000, 5, sharpness=3)
    t = metrics.temperature(targets, table)
    assert t == pytest.approx(3, rel=0.05)
    fresh_targets, fresh = sampled(20_000, 5, seed=1, sharpness=3)
    assert metrics.calibration(fresh_targets, metrics.with_temperature(fresh, t))["ece"] < 0.015
    assert (metrics.with_temperature(fresh, t).argmax(1) == fresh.argmax(1)).all()


def test_probabilities_of_zero_and_one_are_scored():
    targets, table = np.array([0, 1]), np.eye(2, dtype=np.float32)[[0, 0]]
    scores = metrics.score(targets, table, ["x", "y"], resamples=100)
    assert np.isfinite(scores.log_loss)
    assert np.isfinite(metrics.temperature(targets, table))


def test_intervals_repeat_with_the_seed_and_hold_the_score():
    targets, table = sampled(400, 4)
    ours = labelling(targets, table.argmax(1))
    first, again, other = (metrics.intervals(ours, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    accuracy, macro_f1 = first
    assert accuracy.low < ours.accuracy < accuracy.high
    assert macro_f1.low < ours.macro_f1 < macro_f1.high


def test_intervals_are_those_of_resampling_row_by_row():
    targets, table = sampled(200, 4)
    predicted, draw = table.argmax(1), np.random.default_rng(3)
    rows = draw.integers(0, 200, size=(2000, 200))
    f1s = [f1_score(targets[r], predicted[r], average="macro", zero_division=0) for r in rows[:400]]
    accuracy, macro_f1 = metrics.intervals(labelling(targets, predicted), resamples=4000)
    by_row = np.percentile((targets == predicted)[rows].mean(axis=1), [2.5, 97.5])
    np.testing.assert_allclose(accuracy, by_row, atol=0.015)
    np.testing.assert_allclose(macro_f1, np.percentile(f1s, [2.5, 97.5]), atol=0.02)


def test_ninety_five_percent_intervals_cover_the_true_accuracy_about_that_often():
    draw, hits = np.random.default_rng(0), 0
    for seed in range(200):
        right = draw.random(300) < 0.8
        ours = labelling(np.zeros(300, int), np.where(right, 0, 1))
        low, high = metrics.intervals(ours, resamples=300, seed=seed)[0]
        hits += low <= 0.8 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_a_comparison_pairs_the_rows():
    targets, table = sampled(300, 4)
    predicted = table.argmax(1)
    same = metrics.compare(labelling(targets, predicted), labelling(targets, predicted))
    assert same.lead == 0
    assert same.lead_ci == (0, 0)
    worse = np.where(np.arange(300) < 60, (targets + 1) % 4, predicted)
    lead = metrics.compare(labelling(targets, predicted), labelling(targets, worse))
    assert 0 < lead.lead_ci.low < lead.lead < lead.lead_ci.high
    assert lead.accuracy_ci.low < lead.accuracy < lead.accuracy_ci.high


def test_a_thousand_resamples_of_a_real_test_set_take_no_time():
    targets, table = sampled(3600, 12)
    start = time.process_time()
    metrics.intervals(labelling(targets, table.argmax(1), 12))
    assert time.process_time() - start < 2
