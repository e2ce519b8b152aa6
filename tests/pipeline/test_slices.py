import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.bootstrap import intervals
from pipeline.labelling import Labelling
from pipeline.slices import Slicing, confusions

NAMES = ["ape", "bee", "cow"]


def slicing(targets: list[int], predicted: list[int], confidence: float = 0.7) -> Slicing:
    labelling = Labelling(np.array(targets), np.array(predicted), 3)
    return Slicing(labelling, np.full(len(targets), confidence), resamples=100)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60))
@settings(max_examples=30)
def test_every_text_is_in_one_quarter_and_lengths_do_not_overlap(lengths: list[int]):
    n = len(lengths)
    parts = slicing([0] * n, [0] * n).by_length(np.array(lengths), longest=100)
    assert sum(part.n for part in parts) == n
    assert 1 <= len(parts) <= 4
    ends = [int(word) for part in parts for word in part.name.split() if word.isdigit()]
    assert ends == sorted(ends)


def test_a_quarter_has_the_scores_of_its_rows():
    lengths = np.repeat([2, 4, 8, 16], 10)
    targets = [0, 1] * 20
    predicted = [0] * 10 + targets[10:]
    parts = slicing(targets, predicted).by_length(lengths, longest=100)
    assert [part.name for part in parts] == ["2 tokens", "4 tokens", "8 tokens", "16 tokens"]
    assert [part.accuracy for part in parts] == [0.5, 1.0, 1.0, 1.0]
    assert parts[0].confidence == 0.7
    alone = Labelling(np.array(targets[:10]), np.array(predicted[:10]), 3)
    assert (parts[0].accuracy_ci, parts[0].macro_f1_ci) == intervals(alone, resamples=100)


def test_texts_that_are_cut_off_are_shown_by_themselves():
    parts = slicing([0] * 4, [0, 0, 0, 1]).by_length(np.array([5, 6, 7, 2000]), longest=1000)
    assert parts[-1].name == "cut off after 1,000 tokens"
    assert (parts[-1].n, parts[-1].accuracy) == (1, 0.0)


def test_confusions_come_by_count_with_the_surest_example():
    targets, predicted = np.array([0, 0, 0, 1, 2, 2]), np.array([1, 1, 0, 2, 2, 0])
    confidence = np.array([0.5, 0.9, 0.9, 0.6, 0.9, 0.8])
    rows = confusions(Labelling(targets, predicted, 3), confidence, list("uvwxyz"), NAMES)
    assert [(row.label, row.predicted, row.count, row.example) for row in rows] == [
        ("ape", "bee", 2, "v"),
        ("bee", "cow", 1, "x"),
        ("cow", "ape", 1, "z"),
    ]
    assert [row.share for row in rows] == [0.666667, 1.0, 0.5]


def test_a_perfect_classifier_confuses_nothing():
    same = np.array([0, 1, 2])
    assert confusions(Labelling(same, same, 3), np.ones(3), list("abc"), NAMES) == []
