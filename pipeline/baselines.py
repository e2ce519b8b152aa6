"""What a classifier must beat to be worth its training: the most frequent class, and TF-IDF with logistic regression.

Both learn from the training and the validation rows: what a neural network spends on early stopping, these may read.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from pipeline.metrics import Labelling
from pipeline.splitting import LabelledSplit

Targets = Int64[np.ndarray, " n"]

STRENGTHS = (3.0, 10.0, 30.0, 100.0)
"""Inverse regularisation strengths to choose from, the most regularised first."""

WORD = r"\w+"
"""Words of one letter count too: .005 of macro-F1 on short glosses, .02 where languages are told apart."""


def majority(targets: Targets, n_texts: int) -> Targets:
    """The most frequent class, as often as there are texts; of equally frequent ones the lowest number."""
    most = min(Counter(targets.tolist()).items(), key=lambda item: (-item[1], item[0]))[0]
    return np.full(n_texts, most, dtype=np.int64)


def tfidf_logreg(train: LabelledSplit, validation: LabelledSplit, texts: Sequence[str]) -> Targets:
    """The class of each text by logistic regression over TF-IDF of words and pairs of words.

    The regularisation is the one with the best macro-F1 on `validation`; then both splits are learned from. Where
    there is nothing to learn (one class, or no words) this is `majority`.
    """
    both = LabelledSplit([*train.texts, *validation.texts], np.concatenate([train.targets, validation.targets]))
    if not _learnable(both):
        return majority(both.targets, len(texts))
    features, regression = _features(), _regression(_best_strength(train, validation))
    regression.fit(features.fit_transform(both.texts), both.targets)
    return np.asarray(regression.predict(features.transform(texts)))


def _learnable(split: LabelledSplit) -> bool:
    words = _features().build_analyzer()
    return len(np.unique(split.targets)) > 1 and any(words(text) for text in split.texts)


def _best_strength(train: LabelledSplit, validation: LabelledSplit) -> float:
    if not validation.texts or not _learnable(train):
        return STRENGTHS[-1]
    features = _features().fit(train.texts)
    known, unseen = features.transform(train.texts), features.transform(validation.texts)

    n_labels = 1 + int(max(train.targets.max(), validation.targets.max()))

    def quality(strength: float) -> float:
        predicted = np.asarray(_regression(strength).fit(known, train.targets).predict(unseen))
        return Labelling(validation.targets, predicted, n_labels).macro_f1

    return max(STRENGTHS, key=quality)


def _features() -> TfidfVectorizer:
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=1, token_pattern=WORD)


def _regression(strength: float) -> OneVsRestClassifier:
    """One class against the rest by liblinear's dual solver: 30 times as fast as softmax by L-BFGS, and no worse."""
    solver = LogisticRegression(C=strength, solver="liblinear", dual=True, max_iter=1000, random_state=0)
    return OneVsRestClassifier(solver)
