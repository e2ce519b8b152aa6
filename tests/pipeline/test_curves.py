from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from pipeline import curves
from tests.pipeline.test_metrics import sampled

NAMES = list("abcd")


def test_areas_are_scikit_learns_and_the_mean_is_theirs():
    targets, table = sampled(400, 4)
    drawn = curves.one_vs_rest(targets, table, NAMES)
    for i, (roc, pr) in enumerate(zip(drawn.roc, drawn.precision_recall, strict=True)):
        assert roc.name == pr.name == NAMES[i]
        assert roc.area == pytest.approx(roc_auc_score(targets == i, table[:, i]), abs=1e-6)
        assert pr.area == pytest.approx(average_precision_score(targets == i, table[:, i]), abs=1e-6)
    assert drawn.macro_roc is not None
    assert drawn.macro_roc.area == pytest.approx(
        roc_auc_score(targets, table.astype(float) / table.sum(1, keepdims=True, dtype=float), multi_class="ovr"),
        abs=1e-5,
    )


def test_the_mean_curves_lie_between_the_curves_and_have_their_area():
    targets, table = sampled(2000, 4)
    drawn = curves.one_vs_rest(targets, table, NAMES)
    for kind, mean in ((drawn.roc, drawn.macro_roc), (drawn.precision_recall, drawn.macro_precision_recall)):
        assert mean is not None
        assert np.trapezoid(mean.y, mean.x) == pytest.approx(mean.area, abs=0.01)
        assert min(c.area for c in kind) <= mean.area <= max(c.area for c in kind)
        assert (np.diff(mean.x) > 0).all()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=30))
def test_curves_run_from_0_to_1_and_stay_there(rows: list[tuple[bool, int]]):
    positive, scores = np.array([p for p, _ in rows]), np.array([s / 5 for _, s in rows])
    if positive.all() or not positive.any():
        return
    for curve in (curves.roc("x", positive, scores), curves.precision_recall("x", positive, scores)):
        assert (curve.x[0], curve.x[-1]) == (0, 1)
        assert (np.diff(curve.x) >= 0).all()
        assert ((curve.y >= 0) & (curve.y <= 1)).all()


def test_a_class_without_texts_or_with_all_of_them_has_no_curve():
    table = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])
    drawn = curves.one_vs_rest(np.array([0, 1]), table, NAMES[:3])
    assert [curve.name for curve in drawn.roc] == ["a", "b"]
    alone = curves.one_vs_rest(np.array([0, 0]), table, NAMES[:3])
    assert (alone.roc, alone.macro_roc, alone.macro_precision_recall) == ([], None, None)


def test_thresholds_trade_coverage_for_accuracy_and_none_is_repeated():
    targets, table = sampled(3000, 4)
    rows = curves.thresholds(targets, table)
    assert (rows[0].threshold, rows[0].coverage, rows[0].n) == (0.0, 1.0, 3000)
    assert all(a.n > b.n for a, b in pairwise(rows))
    kept = table.max(1) >= 0.8
    [row] = [row for row in rows if row.threshold == 0.8]
    assert row.n == kept.sum()
    assert row.accuracy == pytest.approx((table.argmax(1) == targets)[kept].mean(), abs=1e-6)
    expected = f1_score(targets[kept], table.argmax(1)[kept], average="macro", zero_division=0)
    assert row.macro_f1 == pytest.approx(expected, abs=1e-6)
    accuracies = [row.accuracy for row in rows if row.accuracy is not None]
    assert accuracies == sorted(accuracies)


def test_a_threshold_that_nothing_reaches_has_no_scores():
    rows = curves.thresholds(np.array([0, 1]), np.array([[0.55, 0.45], [0.45, 0.55]]))
    assert [(row.threshold, row.n) for row in rows] == [(0.0, 2), (0.6, 0)]
    assert (rows[-1].accuracy, rows[-1].macro_f1) == (None, None)


def test_cuts_of_two_classes_by_hand():
    targets, p = np.array([1, 1, 1, 0, 0]), np.array([0.95, 0.6, 0.2, 0.7, 0.1])
    rows = {row.threshold: row for row in curves.cuts(targets, np.stack([1 - p, p], axis=1))}
    half = rows[0.5]
    assert (half.flagged, half.precision, half.recall, half.f1) == (0.6, 0.666667, 0.666667, 0.666667)
    assert (rows[0.05].recall, rows[0.05].precision) == (1.0, 0.6)
    assert (rows[0.95].recall, rows[0.95].precision) == (0.333333, 1.0)


def test_answers_equally_sure_are_withheld_together():
    table = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    curve = curves.most_confident(np.array([0, 1, 0]), table)
    assert curve.x.tolist() == [2 / 3, 1.0]
    assert curve.y.tolist() == [0.5, 2 / 3]
    assert curve.area == pytest.approx(0.5 * 2 / 3 + (2 / 3) / 3, abs=1e-6)
