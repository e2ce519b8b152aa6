"""How long things take: seconds by what they were spent on, and how soon a classifier answers."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from pipeline.classify import probabilities
from pipeline.weights import LoadedClassifier

N_TIMED = 100
N_WARM_UP = 3
ENOUGH_SECONDS = 5.0
"""No further text is timed after this long."""


@dataclass(frozen=True)
class Clock:
    """Seconds by what they were spent on."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] = time.perf_counter() - start


def latency(loaded: LoadedClassifier, texts: Sequence[str]) -> tuple[float, float]:
    """Seconds from a text to its probabilities, one text by itself: the median, and the 95th percentile.

    The texts that are timed are spread over all.
    """
    for text in texts[:N_WARM_UP]:
        probabilities(loaded, [text])
    seconds: list[float] = []
    for text in texts[:: -(-len(texts) // N_TIMED)]:
        start = time.perf_counter()
        probabilities(loaded, [text])
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > ENOUGH_SECONDS:
            break
    median, slow = np.percentile(seconds, [50, 95]).tolist()
    return median, slow
