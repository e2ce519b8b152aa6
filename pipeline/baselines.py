"""What a classifier must beat to be worth its training: the most frequent class, and linear models over n-grams.

They learn from the training and the validation rows: what a neural network spends on early stopping, these may read.
The regularisation is the one with the best macro-F1 on the validation rows, then both splits are learned from.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import FeatureUnion
from sklearn.svm import LinearSVC

from pipeline.labelling import Labelling
from pipeline.splitting import LabelledSplit
from pipeline.targets import Targets, is_multi_label
from pipeline.tracking import Silent

BaselineName = Literal["tfidf-logreg", "linear-svm"]

WORD = r"\w+"
"""Words of one letter count too: .005 of macro-F1 on short glosses, .02 where languages are told apart."""

MANY = 1000


@dataclass(frozen=True)
class Linear:
    """A linear classifier over TF-IDF features: how both are made, and the inverse strengths C to choose from."""

    features: Callable[[int], Any]
    """Of a number of texts, what counts n-grams in them."""
    classifier: Callable[[float], Any]
    strengths: tuple[float, ...]
    """The most regularised first; where nothing can be chosen, the last one stands."""

    def predict(
        self,
        train: LabelledSplit,
        validation: LabelledSplit,
        texts: Sequence[str],
        on_progress: Callable[[int, int, str], None] | None = None,
    ) -> Targets:
        """What it answers to each text. Where there is nothing to learn (one answer, or no words), `majority`.

        `on_progress` hears how many of its fits are done, of how many, and what comes next.
        """
        both = LabelledSplit([*train.texts, *validation.texts], np.concatenate([train.targets, validation.targets]))
        if not _learnable(both):
            return majority(both.targets, len(texts))
        fits, tell = len(self.strengths) + 1, on_progress or Silent().progress
        tell(0, fits, f"counting n-grams of {len(both.texts):,} texts")
        features = self.features(len(both.texts))
        known = features.fit_transform(both.texts)
        strength = self._best_strength(
            known, both.targets, len(train.texts), lambda done, c: tell(done, fits, f"trying C={c:g}")
        )
        tell(fits - 1, fits, f"learning from all texts with C={strength:g}")
        return np.asarray(self._fitted(strength, known, both.targets).predict(features.transform(texts)))

    def _fitted(self, strength: float, rows: Any, targets: Targets) -> Any:
        """The classifier, which has learned; of several classes, one for each, against the rest."""
        one = self.classifier(strength)
        return (OneVsRestClassifier(one) if is_multi_label(targets) else one).fit(rows, targets)

    def _best_strength(self, rows: Any, targets: Targets, n_train: int, on_try: Callable[[int, float], None]) -> float:
        """The first `n_train` rows are learned from, and the others decide."""
        if n_train == len(targets) or len(np.unique(targets[:n_train], axis=0)) < 2:
            return self.strengths[-1]
        n_labels = targets.shape[1] if is_multi_label(targets) else 1 + int(targets.max())

        scores: list[float] = []
        for strength in self.strengths:
            on_try(len(scores), strength)
            predicted = self._fitted(strength, rows[:n_train], targets[:n_train]).predict(rows[n_train:])
            scores.append(Labelling(targets[n_train:], np.asarray(predicted), n_labels).macro_f1)
        return self.strengths[int(np.argmax(scores))]


def majority(targets: Targets, n_texts: int) -> Targets:
    """The most frequent class, as often as there are texts; of equally frequent ones the lowest number.

    Where a text may have several, the most frequent set of classes.
    """
    answers = map(tuple, targets.tolist()) if is_multi_label(targets) else targets.tolist()
    most = min(Counter(answers).items(), key=lambda item: (-item[1], item[0]))[0]
    return np.broadcast_to(np.array(most, dtype=np.int64), (n_texts, *targets.shape[1:])).copy()


def _learnable(split: LabelledSplit) -> bool:
    words = _words(len(split.texts)).build_analyzer()
    return len(np.unique(split.targets, axis=0)) > 1 and any(words(text) for text in split.texts)


def _words(n_texts: int) -> TfidfVectorizer:
    del n_texts  # rare pairs of words are worth their memory
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=1, token_pattern=WORD)


def _words_and_characters(n_texts: int) -> FeatureUnion:
    """Endings and misspelt words count too. Of many texts, parts that stand in one alone are left out: memory."""
    rare = 2 if n_texts >= MANY else 1
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=rare)
    return FeatureUnion([("words", _words(n_texts)), ("characters", characters)])


def _regression(strength: float) -> OneVsRestClassifier:
    """One class against the rest by liblinear's dual solver: 30 times as fast as softmax by L-BFGS, and no worse."""
    solver = LogisticRegression(C=strength, solver="liblinear", dual=True, max_iter=1000, random_state=0)
    return OneVsRestClassifier(solver)


def _svm(strength: float) -> LinearSVC:
    """One class against the rest. A tolerance of .01 instead of .0001 is faster, and changed no score by .0005."""
    return LinearSVC(C=strength, dual=True, tol=1e-2, random_state=0)  # pyright: ignore[reportArgumentType]


BASELINES: Mapping[BaselineName, Linear] = {
    "tfidf-logreg": Linear(_words, _regression, (3.0, 10.0, 30.0, 100.0)),
    "linear-svm": Linear(_words_and_characters, _svm, (0.1, 0.3, 1.0, 3.0)),
}
"""By the names that a config has: over words and pairs of words, and over these and parts of words."""
