"""Learning what n-grams say of a label, and how much it counts beside what a network says."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, diags, vstack
from scipy.special import log_softmax, logit
from sklearn.linear_model import LogisticRegression

from model.ngrams import NGrams
from pipeline.targets import Probabilities, Targets, is_multi_label, members

Logits = Float[np.ndarray, "n n_labels"]
Features = Any
"""A scipy.sparse.csr_matrix, float64 [documents, buckets]; its type stubs are too vague to help."""

TOKENS_AT_ONCE = 2**20


def features(ngrams: NGrams, documents: Sequence[np.ndarray]) -> Features:
    """[documents, buckets]: how often each row of the table is read, over the root of all, as `NGrams` weighs them."""
    return vstack([_features(ngrams, some) for some in _chunks(documents)], format="csr")


def _chunks(documents: Sequence[np.ndarray]) -> Iterator[Sequence[np.ndarray]]:
    ends = np.cumsum([len(document) for document in documents]) // TOKENS_AT_ONCE
    for chunk in np.unique(ends):
        first, last = np.searchsorted(ends, [chunk, chunk + 1])
        yield documents[first:last]


def _features(ngrams: NGrams, documents: Sequence[np.ndarray]) -> Features:
    lengths = [len(document) for document in documents]
    tokens = torch.from_numpy(np.concatenate(documents)).long()[None]
    places = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None]
    owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))[None]
    found = [(owner[there], row[there]) for row, there in ngrams.hashes(tokens, places, torch.ones_like(tokens) > 0)]
    rows, columns = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    counts = np.bincount(rows)
    return csr_matrix((1 / np.sqrt(counts[rows]), (rows, columns)), (len(lengths), len(ngrams.table)))


def learned_table(
    known: Features, targets: Targets, n_labels: int, strength: float, weights: Float32[np.ndarray, " n"] | None = None
) -> Float32[np.ndarray, "buckets n_labels"]:
    """A logistic regression of each class against the rest, with the inverse regularisation `strength`.

    A class counts as much as its absence, and a row of the table may say the more, the fewer texts have it: only the
    regularisation feels that. A class with nothing to learn adds nothing. liblinear's dual solver is the fastest here,
    and its seed makes it the same every time.
    """
    n_texts, n_buckets = known.shape
    rarity = np.log((1 + n_texts) / (1 + np.bincount(known.indices, minlength=n_buckets))) + 1
    scaled = known @ diags(rarity)
    solver = LogisticRegression(
        C=strength,
        solver="liblinear",
        dual=True,
        fit_intercept=False,
        max_iter=1000,
        random_state=0,
        class_weight="balanced",
    )
    table = np.zeros((n_buckets, n_labels), dtype=np.float32)
    for label, answers in enumerate(members(targets, n_labels).T):
        if answers.any() and not answers.all():
            table[:, label] = solver.fit(scaled, answers, sample_weight=weights).coef_[0] * rarity
    return table


@dataclass(frozen=True)
class Blend:
    """What the logits of the network and of the n-grams are multiplied by, and the log loss of their sum, in nats."""

    deep: float
    wide: float
    log_loss: float

    @classmethod
    def best(cls, targets: Targets, deep: Logits, wide: Logits) -> "Blend":
        """The weights, neither negative, of the lowest log loss: a convex problem in two numbers."""

        def loss(by: np.ndarray) -> float:
            return log_loss(targets, by[0] * deep + by[1] * wide)

        found = minimize(loss, np.array([0.5, 0.5]), method="L-BFGS-B", bounds=[(0, None)] * 2)
        return cls(float(found.x[0]), float(found.x[1]), float(found.fun))


def log_loss(targets: Targets, logits: Logits) -> float:
    """Nats a text; where a text may have several classes, nats a text and class."""
    if is_multi_label(targets):
        return float(np.logaddexp(0, np.where(targets == 1, -logits, logits)).mean())
    return float(-log_softmax(logits, axis=1)[np.arange(len(targets)), targets].mean())


def logits_of(probabilities: Probabilities, *, multi_label: bool) -> Logits:
    """What gives these probabilities; of classes that exclude each other, up to a constant a text."""
    exact = probabilities.astype(np.float64)
    if multi_label:
        return logit(np.clip(exact, np.finfo(np.float64).tiny, 1 - np.finfo(np.float64).epsneg))
    return np.log(np.maximum(exact, np.finfo(np.float32).tiny))
