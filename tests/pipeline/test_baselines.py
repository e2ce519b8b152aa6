import random

import numpy as np
import pytest

from pipeline.baselines import STRENGTHS, _best_strength, majority, tfidf_logreg
from pipeline.splitting import LabelledSplit

WORDS = {0: "apple pear plum fig", 1: "iron zinc tin lead", 2: "one two three four"}
NOTHING = LabelledSplit([], np.array([], dtype=np.int64))


def split(rows: int, seed: int = 0) -> LabelledSplit:
    draw = random.Random(seed)
    targets = [draw.randrange(3) for _ in range(rows)]
    texts = [" ".join(draw.choices([*WORDS[t].split(), "and", "the", "of"], k=6)) for t in targets]
    return LabelledSplit(texts, np.array(targets, dtype=np.int64))


def test_the_majority_is_the_most_frequent_class_and_a_tie_is_decided():
    assert majority(np.array([2, 1, 2]), 2).tolist() == [2, 2]
    assert majority(np.array([1, 0]), 1).tolist() == [0]


def test_words_that_give_the_class_away_are_learned():
    test = split(200, seed=2)
    predicted = tfidf_logreg(split(200), split(50, seed=1), test.texts)
    assert (predicted == test.targets).mean() > 0.9
    assert predicted.dtype == np.int64


def test_pairs_of_words_count():
    texts, targets = ["good not bad", "bad not good"] * 30, np.array([0, 1] * 30)
    predicted = tfidf_logreg(LabelledSplit(texts, targets), NOTHING, texts)
    assert (predicted == targets).all()


def test_the_validation_rows_choose_the_strength_and_are_learned_from():
    train, unseen = split(100), LabelledSplit(["zebra"] * 30, np.full(30, 1))
    assert tfidf_logreg(train, unseen, ["zebra zebra"]).tolist() == [1]
    assert _best_strength(train, split(50, seed=1)) in STRENGTHS


def test_the_baseline_repeats_itself():
    test = split(100, seed=2)
    first, again = (tfidf_logreg(split(80), split(30, seed=1), test.texts) for _ in range(2))
    assert (first == again).all()


@pytest.mark.parametrize(
    "train",
    [
        LabelledSplit(["a b", "c d", "e f"], np.array([1, 1, 1])),
        LabelledSplit(["?!", "...", "--"], np.array([1, 1, 0])),
    ],
    ids=["one class", "no words"],
)
def test_where_nothing_can_be_learned_the_majority_stands_in(train: LabelledSplit):
    assert tfidf_logreg(train, NOTHING, ["a b", "x"]).tolist() == [1, 1]


def test_one_class_in_train_and_another_in_validation_is_no_error():
    train = LabelledSplit(["a b"] * 5, np.zeros(5, dtype=np.int64))
    validation = LabelledSplit(["c d"] * 5, np.ones(5, dtype=np.int64))
    assert tfidf_logreg(train, validation, ["c d"]).tolist() == [1]
