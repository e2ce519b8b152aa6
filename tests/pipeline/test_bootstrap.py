import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from pipeline import bootstrap
from pipeline.labelling import Labelling
from tests.pipeline.test_metrics import labelling, sampled


def test_intervals_repeat_with_the_seed_and_hold_the_score():
    targets, table = sampled(400, 4)
    ours = labelling(targets, table.argmax(1))
    first, again, other = (bootstrap.intervals(ours, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    accuracy, macro_f1 = first
    assert accuracy.low < ours.accuracy < accuracy.high
    assert macro_f1.low < ours.macro_f1 < macro_f1.high


def test_intervals_are_those_of_resampling_row_by_row():
    targets, table = sampled(200, 4)
    predicted, draw = table.argmax(1), np.random.default_rng(3)
    rows = draw.integers(0, 200, size=(2000, 200))
    f1s = [f1_score(targets[r], predicted[r], average="macro", zero_division=0) for r in rows[:400]]
    accuracy, macro_f1 = bootstrap.intervals(labelling(targets, predicted), resamples=4000)
    by_row = np.percentile((targets == predicted)[rows].mean(axis=1), [2.5, 97.5])
    np.testing.assert_allclose(accuracy, by_row, atol=0.015)
    np.testing.assert_allclose(macro_f1, np.percentile(f1s, [2.5, 97.5]), atol=0.02)


def test_ninety_five_percent_intervals_cover_the_true_accuracy_about_that_often():
    draw, hits = np.random.default_rng(0), 0
    for seed in range(200):
        right = draw.random(300) < 0.8
        ours = labelling(np.zeros(300, int), np.where(right, 0, 1))
        low, high = bootstrap.intervals(ours, resamples=300, seed=seed)[0]
        hits += low <= 0.8 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_a_comparison_pairs_the_rows():
    targets, table = sampled(300, 4)
    predicted = table.argmax(1)
    same = bootstrap.compare(labelling(targets, predicted), labelling(targets, predicted))
    assert same.lead == 0
    assert same.lead_ci == (0, 0)
    worse = np.where(np.arange(300) < 60, (targets + 1) % 4, predicted)
    lead = bootstrap.compare(labelling(targets, predicted), labelling(targets, worse))
    assert 0 < lead.lead_ci.low < lead.lead < lead.lead_ci.high
    assert lead.accuracy_ci.low < lead.accuracy < lead.accuracy_ci.high


def test_a_thousand_resamples_of_a_real_test_set_take_no_time():
    targets, table = sampled(3600, 12)
    start = time.process_time()
    bootstrap.intervals(labelling(targets, table.argmax(1), 12))
    assert time.process_time() - start < 2


def test_blocks_of_resamples_are_one_stream(monkeypatch: pytest.MonkeyPatch):
    targets, table = sampled(200, 4)
    whole = bootstrap.intervals(labelling(targets, table.argmax(1)), resamples=1100)
    monkeypatch.setattr(bootstrap, "BLOCK", 333)
    assert bootstrap.intervals(labelling(targets, table.argmax(1)), resamples=1100) == whole


def test_the_p_value_is_small_for_a_clear_lead_and_one_for_none():
    targets, table = sampled(300, 4)
    predicted = table.argmax(1)
    ours = labelling(targets, predicted)
    assert bootstrap.compare(ours, ours).p_value == 1.0
    worse = labelling(targets, np.where(np.arange(300) < 60, (targets + 1) % 4, predicted))
    assert bootstrap.compare(ours, worse, resamples=1999).p_value == pytest.approx(2 / 2000)
    assert bootstrap.compare(worse, ours, resamples=1999).p_value == pytest.approx(2 / 2000)


def test_the_p_value_and_the_interval_tell_the_same_story():
    draw = np.random.default_rng(0)
    for seed in range(20):
        targets = draw.integers(0, 3, 150)
        ours, theirs = (np.where(draw.random(150) < share, targets, draw.integers(0, 3, 150)) for share in (0.7, 0.6))
        found = bootstrap.compare(labelling(targets, ours, 3), labelling(targets, theirs, 3), seed=seed)
        if not 0.04 < found.p_value < 0.06:
            assert (found.p_value < 0.05) == (found.lead_ci.low > 0 or found.lead_ci.high < 0)


def test_of_equally_good_classifiers_about_one_pair_in_twenty_differs_at_five_percent():
    draw, rejected = np.random.default_rng(1), 0
    for seed in range(200):
        targets = draw.integers(0, 2, 400)
        ours, theirs = (np.where(draw.random(400) < 0.8, targets, 1 - targets) for _ in range(2))
        found = bootstrap.compare(labelling(targets, ours, 2), labelling(targets, theirs, 2), resamples=400, seed=seed)
        rejected += found.p_value < 0.05
    assert 2 <= rejected <= 20


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
@settings(deadline=None)
def test_mcnemar_is_a_coin_toss_over_the_rows_that_one_alone_gets_right(rows: list[tuple[bool, bool]]):
    we, they = (np.array([int(not row[side]) for row in rows], dtype=np.int64) for side in (0, 1))
    truth = np.zeros(len(rows), dtype=np.int64)
    p = bootstrap.mcnemar(Labelling(truth, we, 2), Labelling(truth, they, 2))
    ours, theirs = sum(a and not b for a, b in rows), sum(b and not a for a, b in rows)
    assert p == pytest.approx(binomtest(ours, ours + theirs).pvalue if ours + theirs else 1.0)
