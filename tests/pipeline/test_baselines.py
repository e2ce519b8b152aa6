import random
from dataclasses import replace

import numpy as np
import pytest

from pipeline.baselines import BASELINES, BaselineName, majority
from pipeline.splitting import LabelledSplit

WORDS = {0: "apple pear plum fig", 1: "iron zinc tin lead", 2: "one two three four"}
NAMES = list(BASELINES)
NOTHING = LabelledSplit([], np.array([], dtype=np.int64))


def predict(name: BaselineName, train: LabelledSplit, validation: LabelledSplit, texts: list[str]) -> np.ndarray:
    return BASELINES[name].predict(train, validation, texts)


def split(rows: int, seed: int = 0) -> LabelledSplit:
    draw = random.Random(seed)
    targets = [draw.randrange(3) for _ in range(rows)]
    texts = [" ".join(draw.choices([*WORDS[t].split(), "and", "the", "of"], k=6)) for t in targets]
    return LabelledSplit(texts, np.array(targets, dtype=np.int64))


def test_the_majority_is_the_most_frequent_class_and_a_tie_is_decided():
    assert majority(np.array([2, 1, 2]), 2).tolist() == [2, 2]
    assert majority(np.array([1, 0]), 1).tolist() == [0]


@pytest.mark.parametrize("name", NAMES)
def test_words_that_give_the_class_away_are_learned(name: BaselineName):
    test = split(200, seed=2)
    predicted = predict(name, split(200), split(50, seed=1), test.texts)
    assert (predicted == test.targets).mean() > 0.9
    assert predicted.dtype == np.int64


@pytest.mark.parametrize("name", NAMES)
def test_pairs_of_words_count(name: BaselineName):
    texts, targets = ["good not bad", "bad not good"] * 30, np.array([0, 1] * 30)
    predicted = predict(name, LabelledSplit(texts, targets), NOTHING, texts)
    assert (predicted == targets).all()


def test_only_the_svm_sees_parts_of_words():
    train = LabelledSplit(["walking", "running", "walked", "jumped"] * 5, np.array([0, 0, 1, 1] * 5))
    unseen = ["singing", "cooked"]
    assert predict("linear-svm", train, NOTHING, unseen).tolist() == [0, 1]
    first, second = predict("tfidf-logreg", train, NOTHING, unseen)
    assert first == second


@pytest.mark.parametrize("name", NAMES)
def test_the_validation_rows_are_learned_from(name: BaselineName):
    unseen = LabelledSplit(["zebra"] * 30, np.full(30, 1))
    assert predict(name, split(100), unseen, ["zebra zebra"]).tolist() == [1]


def test_the_strength_is_the_best_of_the_validation_rows():
    tried: list[float] = []

    class Echo:
        """Says 1 at strength 2 and 0 otherwise."""

        def __init__(self, strength: float) -> None:
            tried.append(strength)
            self.answer = int(strength == 2)

        def fit(self, rows: object, targets: object) -> "Echo":
            return self

        def predict(self, rows: np.ndarray) -> np.ndarray:
            return np.full(rows.shape[0], self.answer)

    linear = replace(BASELINES["tfidf-logreg"], classifier=Echo, strengths=(1.0, 2.0, 3.0))
    train = LabelledSplit(["a b", "c d"], np.array([0, 1]))
    told: list[tuple[int, int, str]] = []
    answers = linear.predict(train, LabelledSplit(["a d"], np.array([1])), ["x"], lambda *each: told.append(each))
    assert answers.tolist() == [1]
    assert tried == [1.0, 2.0, 3.0, 2.0]
    assert told == [
        (0, 4, "counting n-grams of 3 texts"),
        (0, 4, "trying C=1"),
        (1, 4, "trying C=2"),
        (2, 4, "trying C=3"),
        (3, 4, "learning from all texts with C=2"),
    ]
    assert linear.predict(train, NOTHING, ["x"]).tolist() == [0], "nothing to choose by: the last one"


@pytest.mark.parametrize("name", NAMES)
def test_the_baseline_repeats_itself(name: BaselineName):
    test = split(100, seed=2)
    first, again = (predict(name, split(80), split(30, seed=1), test.texts) for _ in range(2))
    assert (first == again).all()


@pytest.mark.parametrize(
    "train",
    [
        LabelledSplit(["a b", "c d", "e f"], np.array([1, 1, 1])),
        LabelledSplit(["?!", "...", "--"], np.array([1, 1, 0])),
    ],
    ids=["one class", "no words"],
)
@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_can_be_learned_the_majority_stands_in(train: LabelledSplit, name: BaselineName):
    assert predict(name, train, NOTHING, ["a b", "x"]).tolist() == [1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_one_class_in_train_and_another_in_validation_is_no_error(name: BaselineName):
    train = LabelledSplit(["a b"] * 5, np.zeros(5, dtype=np.int64))
    validation = LabelledSplit(["c d"] * 5, np.ones(5, dtype=np.int64))
    assert predict(name, train, validation, ["c d"]).tolist() == [1]
