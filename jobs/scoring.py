"""Texts to probabilities, piece by piece, in this process or in several of this machine.

Several are plain processes and no Ray tasks: pieces of texts are small, nothing has to be placed on machines, and the
processes answer in the seconds that a Ray of its own takes to start.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from jobs.parent import end_with_parent
from pipeline import export
from pipeline.classify import blank_table, document_probabilities, longest_window, tokenize_windows
from pipeline.engine import pick_device
from pipeline.errors import WorkerLost
from pipeline.pieces import Piece
from pipeline.precision import resolve
from pipeline.text import normalise
from pipeline.weights import LoadedClassifier

AHEAD = 2
"""Pieces that each process has been given or is at work on."""
PASS_TOKENS = 256
"""What one more forward pass may save in padding to be worth it. On two CPU cores 64 to 512 differ by a third."""

Score = Callable[[Sequence[str]], np.ndarray]
Scoring = Callable[[Iterable[Piece]], Iterator[tuple[Piece, np.ndarray]]]


@contextmanager
def scoring(folder: Path, loaded: LoadedClassifier, precision: str, workers: int) -> Iterator[Scoring]:
    """How pieces become probabilities, [rows, labels], in their order; `loaded` is what `folder` holds.

    The block raises WorkerLost where a process is lost.
    """
    if workers == 1:
        score = scorer(loaded, precision)
        yield lambda pieces: ((piece, score(piece.texts)) for piece in pieces)
        return
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_be_worker, initargs=(threads,)) as pool:
        try:
            yield partial(_in_order, lambda texts: pool.submit(_score, folder, precision, texts), workers * AHEAD)
        except BrokenProcessPool as error:
            raise WorkerLost("a process that labels rows was lost, perhaps for want of memory: --workers 1") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def scorer(loaded: LoadedClassifier, precision: str) -> Score:
    """Texts to probabilities, [texts, labels], on the best device here."""
    device = pick_device("auto")
    model = loaded.model.to(device)
    chosen = resolve(precision, device)

    def score(texts: Sequence[str]) -> np.ndarray:
        texts = [normalise(text) for text in texts]
        documents = tokenize_windows(loaded.tokenizer, texts, model.cfg.seq_len, loaded.windows)
        table = blank_table(model, len(documents))
        for group in alike([longest_window(windows) for windows in documents]):
            table[group] = document_probabilities(model, [documents[i] for i in group], precision=chosen)
        return table

    return score


def alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in groups, the longest first: one ends where its length would cost the rest more padding than a pass.

    The few texts of a request differ much in length; in one group most of the work would be on padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    group: list[int] = []
    for place, index in enumerate(order):
        if group and (lengths[group[0]] - lengths[index]) * (len(order) - place) > PASS_TOKENS:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _in_order(
    submit: Callable[[Sequence[str]], Future[np.ndarray]], ahead: int, pieces: Iterable[Piece]
) -> Iterator[tuple[Piece, np.ndarray]]:
    waiting: deque[tuple[Piece, Future[np.ndarray]]] = deque()
    for piece in pieces:
        waiting.append((piece, submit(piece.texts)))
        if len(waiting) == ahead:
            done, answer = waiting.popleft()
            yield done, answer.result()
    for done, answer in waiting:
        yield done, answer.result()


def _be_worker(threads: int) -> None:
    """Use a fair share of the cores, leave Ctrl-C to the parent, and end with it."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(threads)


def _score(folder: Path, precision: str, texts: Sequence[str]) -> np.ndarray:
    return _own_scorer(folder, precision)(texts)


@cache
def _own_scorer(folder: Path, precision: str) -> Score:
    return scorer(export.read(folder).loaded, precision)
