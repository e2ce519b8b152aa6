"""Texts in, probabilities out: the one way a classifier is applied, in validation, evaluation and prediction."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from tokenizers import Tokenizer

from model.heads import Classifier
from pipeline.batches import fill_rows
from pipeline.precision import Precision, autocast
from pipeline.tokens import encode_documents
from pipeline.weights import LoadedClassifier
from pipeline.windows import Windows, mean_over_windows, shortened

TOKENS_PER_BATCH = 8192

Probabilities = Float[np.ndarray, "documents labels"]
"""float32; float64 of a classifier that may give several labels (see `Classifier.probabilities`)."""


def blank_table(model: Classifier, documents: int) -> Probabilities:
    """Room for the probabilities of so many documents: zeros."""
    return np.zeros((documents, model.head.n_labels), dtype=np.float64 if model.head.multi_label else np.float32)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], seq_len: int) -> list[np.ndarray]:
    """Token ids of each text with its special tokens, cut to `seq_len` by dropping the end of the text, not the eos."""
    return [shortened(ids, seq_len) for ids in encode_documents(tokenizer, list(texts))]


def tokenize_windows(
    tokenizer: Tokenizer, texts: Sequence[str], seq_len: int, windows: Windows
) -> list[list[np.ndarray]]:
    """As `tokenize`, but the windows of each text: as it is read."""
    return [windows.cut(ids, seq_len) for ids in encode_documents(tokenizer, list(texts))]


def probabilities(
    loaded: LoadedClassifier,
    texts: Sequence[str],
    *,
    precision: Precision = "fp32",
    on_progress: Callable[[int, int], None] | None = None,
) -> Probabilities:
    """The probability of every label for every text, rows in the order of the texts."""
    documents = tokenize_windows(loaded.tokenizer, texts, loaded.model.cfg.seq_len, loaded.windows)
    return document_probabilities(loaded.model, documents, precision=precision, on_progress=on_progress)


def document_probabilities(
    model: Classifier,
    documents: Sequence[Sequence[np.ndarray]],
    *,
    precision: Precision = "fp32",
    on_progress: Callable[[int, int], None] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Probabilities:
    """As `probabilities`, for the token ids of each document's windows, which one forward pass reads together.

    Batches hold windows of like length, so little is spent on padding. On several ranks each fills in its share of the
    rows and leaves the others 0, all with as many forward passes.
    """
    device = next(model.parameters()).device
    out = blank_table(model, len(documents))
    done = 0
    with torch.inference_mode(), autocast(precision, device):
        groups = list(_by_length(documents))
        for first in range(0, len(groups), world_size):
            group = groups[min(first + rank, len(groups) - 1)]
            tokens, document_ids = fill_rows([[window] for i in group for window in documents[i]])
            logits = model(torch.from_numpy(tokens).to(device), torch.from_numpy(document_ids).to(device))
            if first + rank < len(groups):  # else it only keeps the other ranks company
                logits = mean_over_windows(logits.float(), [len(documents[i]) for i in group])
                out[group] = model.probabilities(logits).cpu().numpy()
            done += len(group)
            if on_progress:
                on_progress(done, len(documents))
    return out


def longest_window(windows: Sequence[np.ndarray]) -> int:
    """Tokens of the longest window of a text: of its rows in a batch."""
    return max(map(len, windows))


def _by_length(documents: Sequence[Sequence[np.ndarray]]) -> Iterator[list[int]]:
    """Indices in groups of about TOKENS_PER_BATCH tokens, the longest rows first: memory is at its peak early on."""
    lengths = [longest_window(windows) for windows in documents]
    group: list[int] = []
    rows = 0
    for index in sorted(range(len(documents)), key=lambda i: -lengths[i]):
        rows += len(documents[index])
        if group and rows * lengths[group[0]] > TOKENS_PER_BATCH:
            yield group
            group, rows = [], len(documents[index])
        group.append(index)
    if group:
        yield group
