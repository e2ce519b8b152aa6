"""Learning what n-grams say of a label."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from scipy.sparse import csr_matrix, diags, hstack, vstack
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from model.ngrams import Bag, NGrams
from pipeline.targets import Targets, members

Table = Float32[np.ndarray, "buckets n_labels"]
"""What every row of all bags says of each class."""
Features = Any
"""A scipy.sparse.csr_matrix, float64 [documents, buckets]; its type stubs are too vague to help."""

TOKENS_AT_ONCE = 2**18


def features(ngrams: NGrams, documents: Sequence[np.ndarray]) -> Features:
    """[documents, buckets of all bags]: what each row of the tables counts in a document, as `Bag` weighs them."""
    return vstack([_features(ngrams, some) for some in _chunks(documents)], format="csr")


def _chunks(documents: Sequence[np.ndarray]) -> Iterator[Sequence[np.ndarray]]:
    ends = np.cumsum([len(document) for document in documents]) // TOKENS_AT_ONCE
    for chunk in np.unique(ends):
        first, last = np.searchsorted(ends, [chunk, chunk + 1])
        yield documents[first:last]


def _features(ngrams: NGrams, documents: Sequence[np.ndarray]) -> Features:
    lengths = torch.tensor([len(document) for document in documents])
    tokens = torch.from_numpy(np.concatenate(documents)).long()[None]
    symbols, n_documents = ngrams.read(tokens, torch.arange(len(documents)).repeat_interleave(lengths)[None])
    return hstack([_weighed(bag, *given, n_documents) for bag, given in zip(ngrams.bags, symbols, strict=True)])


def _weighed(bag: Bag, symbols: Tensor, document: Tensor, n_documents: int) -> Features:
    """[documents, buckets] of one bag."""
    columns, weights, held = (part.numpy() for part in bag.count(symbols, document, n_documents))
    rows = np.repeat(np.arange(len(held)), held)
    scale = np.sqrt(np.bincount(rows, weights))
    return csr_matrix((weights / scale[rows], (rows, columns)), (len(held), len(bag.table)))


def fill(ngrams: NGrams, table: Table) -> None:
    """Give each bag its part of what was learned of all."""
    with torch.no_grad():
        for bag, part in zip(ngrams.bags, np.split(table, len(ngrams.bags)), strict=True):
            bag.table.copy_(torch.from_numpy(part))


def learned_table(
    known: Features,
    targets: Targets,
    n_labels: int,
    strength: float,
    weights: Float32[np.ndarray, " n"] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Table:
    """A logistic regression of each class against the rest, with the inverse regularisation `strength`.

    A class counts as much as its absence, and a row of the table may say the more, the fewer texts have it: only the
    regularisation feels that. A class with nothing to learn adds nothing. liblinear's dual solver is the fastest here,
    and its seed makes it the same every time. `on_progress` hears how many classes are done.
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
        if on_progress:
            on_progress(label + 1, n_labels)
    return table
