"""One class a text, or any number of them: scores of either agree with scikit-learn, and with each other."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit, logit
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
)

from pipeline import bootstrap, curves, metrics
from pipeline.baselines import BASELINES, BaselineName, majority
from pipeline.labelling import Labelling
from pipeline.splitting import LabelledSplit
from pipeline.targets import answered, confidence, decode, encode, members, right, shown
from tests.pipeline.toy_multilabel import CLASSES, rows_of

NAMES = ["a", "b", "c"]
several = st.integers(1, 12).flatmap(
    lambda n: st.tuples(*(arrays(np.int64, (n, 3), elements=st.integers(0, 1)) for _ in range(2)))
)
one = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12)


def sampled(n: int, seed: int = 0, t: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Targets, and probabilities that are as sure of them as they are right where `t` is 1."""
    draw = np.random.default_rng(seed)
    log_odds = draw.normal(-1, 2, size=(n, 3))
    return (draw.random((n, 3)) < expit(log_odds)).astype(np.int64), expit(log_odds * t)


@given(several)
def test_scores_are_scikit_learns_over_the_classes_that_occur(pair: tuple[np.ndarray, np.ndarray]):
    targets, predicted = pair
    ours = Labelling(targets, predicted, 3)
    assert ours.accuracy == pytest.approx(accuracy_score(targets, predicted))
    assert ours.micro_f1 == pytest.approx(f1_score(targets, predicted, average="micro", zero_division=1))
    there = (targets | predicted).any(axis=0)
    f1 = f1_score(targets[:, there], predicted[:, there], average=None, zero_division=0) if there.sum() > 1 else None
    assume(f1 is not None)
    assert ours.macro_f1 == pytest.approx(np.mean(f1))


@given(one)
def test_one_hot_targets_have_the_scores_of_one_class_a_row(pairs: list[tuple[int, int]]):
    targets, predicted = np.array(pairs).T
    hot_of = np.eye(3, dtype=np.int64)
    alone, hot = Labelling(targets, predicted, 3), Labelling(hot_of[targets], hot_of[predicted], 3)
    assert alone.accuracy == hot.accuracy == alone.micro_f1 == hot.micro_f1
    assert alone.macro_f1 == hot.macro_f1
    assert (alone.right == hot.right).all()
    assert (members(targets, 3) == members(hot_of[targets], 3)).all()
    table = np.eye(3)[predicted] * 0.8 + 0.1
    for found, expected in zip(
        metrics.class_scores(hot, NAMES, curves.one_vs_rest(hot.targets, table, NAMES)),
        metrics.class_scores(alone, NAMES, curves.one_vs_rest(alone.targets, table, NAMES)),
        strict=True,
    ):
        assert found == expected


@given(several)
def test_names_come_back_as_they_went(pair: tuple[np.ndarray, np.ndarray]):
    targets, _ = pair
    assert (encode(decode(targets, NAMES), NAMES, multi_label=True) == targets).all()
    numbers = targets[:, 0]
    assert (encode(decode(numbers, NAMES), NAMES, multi_label=False) == numbers).all()


def test_a_class_is_answered_from_one_half_on_and_an_answer_is_as_sure_as_all_of_it():
    table = np.array([[0.5, 0.4, 0.9], [0.1, 0.2, 0.3]])
    assert answered(table, multi_label=True).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert answered(table, multi_label=False).tolist() == [2, 2]
    np.testing.assert_allclose(confidence(table, multi_label=True), [0.5 * 0.6 * 0.9, 0.9 * 0.8 * 0.7])
    assert confidence(table, multi_label=False).tolist() == [0.9, 0.3]
    assert right(np.array([[1, 0, 1], [0, 1, 0]]), answered(table, multi_label=True)).tolist() == [True, False]
    assert (shown("a"), shown(["a", "b"]), shown([])) == ("a", "a, b", "")


def test_rows_without_any_class_are_all_right_where_none_is_answered():
    nothing = np.zeros((4, 3), dtype=np.int64)
    ours = Labelling(nothing, nothing, 3)
    assert (ours.accuracy, ours.macro_f1, ours.micro_f1) == (1, 1, 1)
    assert bootstrap.intervals(ours, resamples=100) == ((1, 1), (1, 1))


def test_everything_about_a_classifier_agrees_with_scikit_learn():
    targets, table = sampled(500)
    scores = metrics.score(targets, table, NAMES, resamples=100)
    predicted = (table >= 0.5).astype(int)
    assert scores.accuracy == pytest.approx(accuracy_score(targets, predicted), abs=1e-6)
    assert scores.macro_f1 == pytest.approx(f1_score(targets, predicted, average="macro"), abs=1e-6)
    each = [log_loss(targets[:, i], table[:, i]) for i in range(3)]
    assert scores.log_loss == pytest.approx(np.mean(each), abs=1e-6)
    assert scores.brier == pytest.approx(((table - targets) ** 2).mean(), abs=1e-6)
    assert scores.roc_auc == pytest.approx(roc_auc_score(targets, table, average="macro"), abs=1e-6)
    assert scores.average_precision == pytest.approx(average_precision_score(targets, table), abs=1e-6)
    precision, recall, f1, support = precision_recall_fscore_support(targets, predicted)
    for i, row in enumerate(scores.per_class):
        found = (row.precision, row.recall, row.f1, row.support)
        assert found == pytest.approx((precision[i], recall[i], f1[i], support[i]), abs=1e-6)


def test_calibration_is_over_every_text_with_every_class():
    targets, table = sampled(20_000)
    bins = metrics.calibration_bins(targets, table)
    assert sum(b.count for b in bins) == targets.size
    assert all(b.low >= 0.46 for b in bins if b.count)
    assert metrics.expected_calibration_error(bins) < 0.01
    too_sure = metrics.calibration_bins(targets, expit(3 * logit(table)))
    assert metrics.expected_calibration_error(too_sure) > 0.05


@pytest.mark.parametrize("t", [0.4, 1.0, 3.0])
def test_the_temperature_is_found_again_and_folds_out(t: float):
    targets, table = sampled(20_000, t=t)
    found = metrics.temperature(targets, table)
    assert found == pytest.approx(t, rel=0.05)
    served = metrics.with_temperature(table, found, multi_label=True)
    np.testing.assert_allclose(served, expit(logit(table) / found), atol=1e-9)
    np.testing.assert_allclose(metrics.with_temperature(served, 1 / found, multi_label=True), table, atol=1e-9)
    losses = {
        s: metrics.calibration(targets, metrics.with_temperature(table, found * s, multi_label=True))
        for s in (0.9, 1, 1.1)
    }
    assert losses[1]["log_loss"] <= min(loss["log_loss"] for loss in losses.values()) + 1e-4


def test_a_few_rows_that_are_all_right_do_not_make_it_certain():
    targets = np.eye(3, dtype=np.int64)
    sure = metrics.with_temperature(
        0.8 * targets + 0.1, metrics.temperature(targets, 0.8 * targets + 0.1), multi_label=True
    )
    assert 0.6 < sure[0, 0] < 0.95


def test_intervals_are_those_of_resampling_row_by_row():
    targets, table = sampled(200)
    predicted, draw = (table >= 0.5).astype(int), np.random.default_rng(3)
    rows = draw.integers(0, 200, size=(600, 200))
    f1s = [f1_score(targets[r], predicted[r], average="macro", zero_division=0) for r in rows]
    accuracy, macro_f1 = bootstrap.intervals(Labelling(targets, predicted, 3), resamples=4000)
    by_row = np.percentile((targets == predicted).all(axis=1)[rows].mean(axis=1), [2.5, 97.5])
    np.testing.assert_allclose(accuracy, by_row, atol=0.02)
    np.testing.assert_allclose(macro_f1, np.percentile(f1s, [2.5, 97.5]), atol=0.02)


def test_a_comparison_pairs_the_rows_and_mcnemar_counts_whole_answers():
    targets, table = sampled(300)
    ours = Labelling.of_probabilities(targets, table)
    same = bootstrap.compare(ours, ours, resamples=200)
    assert (same.lead, same.lead_ci, bootstrap.mcnemar(ours, ours)) == (0, (0, 0), 1.0)
    worse = Labelling(targets, np.where(np.arange(300)[:, None] < 90, 1 - targets, ours.predicted), 3)
    lead = bootstrap.compare(ours, worse, resamples=500)
    assert 0 < lead.lead_ci.low < lead.lead < lead.lead_ci.high
    assert lead.accuracy == pytest.approx(accuracy_score(targets, worse.predicted), abs=1e-6)
    assert 0 < bootstrap.mcnemar(ours, worse) < 1e-9


def test_withheld_answers_leave_better_ones():
    targets, table = sampled(2000)
    rows = curves.thresholds(targets, table)
    assert rows[0].accuracy == pytest.approx(Labelling.of_probabilities(targets, table).accuracy, abs=1e-6)
    kept = [row.accuracy for row in rows if row.n > 50]
    assert kept == sorted(kept)
    answers = curves.most_confident(targets, table)
    assert answers.y[-1] == pytest.approx(rows[0].accuracy, abs=1e-6)
    assert answers.area > answers.y[-1]


@settings(max_examples=30)
@given(several)
def test_curves_are_of_classes_that_some_texts_have_and_others_have_not(pair: tuple[np.ndarray, np.ndarray]):
    targets, _ = pair
    found = curves.one_vs_rest(targets, np.full(targets.shape, 0.3), NAMES)
    assert [c.name for c in found.roc] == [
        n for n, column in zip(NAMES, targets.T, strict=True) if 0 < column.mean() < 1
    ]


def split(rows: list[dict[str, Any]]) -> LabelledSplit:
    return LabelledSplit(
        [row["text"] for row in rows], encode([row["label"] for row in rows], sorted(CLASSES), multi_label=True)
    )


@pytest.mark.parametrize("name", list(BASELINES))
def test_linear_rivals_learn_each_class_against_the_rest(name: BaselineName):
    train, validation, test = (split(rows_of(n, seed)) for n, seed in ((200, 1), (50, 2), (100, 3)))
    predicted = BASELINES[name].predict(train, validation, test.texts)
    assert Labelling(test.targets, predicted, 4).macro_f1 > 0.95
    assert (predicted.sum(axis=1) == 0).any()
    none = LabelledSplit([], np.zeros((0, 4), dtype=np.int64))
    assert BASELINES[name].predict(train, none, test.texts).shape == (100, 4)


def test_the_majority_is_the_most_frequent_set_of_classes():
    targets = np.array([[1, 1], [0, 1], [1, 1], [0, 0]])
    assert majority(targets, 3).tolist() == [[1, 1]] * 3
    assert majority(targets[1:2], 0).shape == (0, 2)
    same = LabelledSplit(["a b", "c d"], targets[[0, 2]])
    assert BASELINES["linear-svm"].predict(same, same, ["x"]).tolist() == [[1, 1]]
