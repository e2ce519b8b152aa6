"""Whether the test texts were there to be learned: in the pretraining corpus, or among the training texts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from pipeline.labelling import rounded
from pipeline.overlap import ENOUGH, SHORTEST, N, Overlap, excerpts, overlap
from pipeline.slices import Slice, Slicing
from pipeline.splitting import alike

MOST_EXAMPLES = 5

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Place:
    """Documents that may hold test texts. `read` starts from the first one each time it is called."""

    read: Callable[[], Iterable[str]]
    n_documents: int


@dataclass(frozen=True)
class Example:
    """A test text that was found. `document` counts from 1; `excerpt` is what it says where the text begins."""

    text: str
    label: str | Sequence[str]
    coverage: float
    document: int
    excerpt: str


@dataclass(frozen=True)
class Leak:
    """How many test texts occur in a place, and the scores with them alone (`found`) and without them (`clean`)."""

    n: int
    share: float
    clean: Slice | None
    found: Slice | None
    examples: list[Example]


@dataclass(frozen=True)
class Contamination:
    """What was found where, and by which rule: `enough` of the n-grams of `n_gram` words. `corpus`: None if not read.

    `unchecked` texts have fewer than `shortest` words, and were looked for among the training texts alone, as wholes.
    """

    n_gram: int
    enough: float
    shortest: int
    unchecked: int
    corpus: Leak | None
    training: Leak

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return asdict(self)


@dataclass(frozen=True)
class Suspects:
    """The test texts with the names of their classes, one or several each, and how any part of them is scored."""

    texts: Sequence[str]
    labels: Sequence[str | Sequence[str]]
    slicing: Slicing

    def examine(self, corpus: Place | None, training: Place, on_progress: Progress) -> Contamination:
        """Look for every test text in both places; each is streamed, the corpus a second time for the examples."""
        seen = self._overlap(training, on_progress)
        in_training = self._wholes(seen, training)
        return Contamination(
            n_gram=N,
            enough=ENOUGH,
            shortest=SHORTEST,
            unchecked=int((~seen.checked).sum()),
            corpus=self._leak(self._overlap(corpus, on_progress), corpus) if corpus else None,
            training=self._leak(in_training, training),
        )

    def _overlap(self, place: Place, on_progress: Progress) -> Overlap:
        return overlap(self.texts, place.read(), on_progress=partial(_told, on_progress, place.n_documents))

    def _wholes(self, seen: Overlap, place: Place) -> Overlap:
        """With the texts that were too short to be checked: found where a document is the like of one."""
        short = {row: alike(self.texts[row]) for row in np.flatnonzero(~seen.checked).tolist()}
        wanted, first = set(short.values()), dict[str, int]()
        for number, document in enumerate(place.read() if wanted else ()):
            if (like := alike(document)) in wanted:
                first.setdefault(like, number)
        source = seen.source.copy()
        source[list(short)] = [first.get(like, -1) for like in short.values()]
        return Overlap(np.where(seen.checked, seen.coverage, (source >= 0).astype(float)), source)

    def _leak(self, seen: Overlap, place: Place) -> Leak:
        found = seen.found
        return Leak(
            n=int(found.sum()),
            share=rounded(found.mean()),
            clean=self.slicing.part("without them", ~found),
            found=self.slicing.part("they alone", found),
            examples=self._examples(seen, place),
        )

    def _examples(self, seen: Overlap, place: Place) -> list[Example]:
        rows = np.flatnonzero(seen.found).tolist()
        chosen = sorted(rows, key=lambda row: (-seen.coverage[row], self.texts[row]))[:MOST_EXAMPLES]
        said = excerpts([(int(seen.source[row]), self.texts[row]) for row in chosen], place.read())
        return [
            Example(
                text=self.texts[row],
                label=self.labels[row],
                coverage=rounded(seen.coverage[row]),
                document=int(seen.source[row]) + 1,
                excerpt=excerpt,
            )
            for row, excerpt in zip(chosen, said, strict=True)
        ]


def _told(on_progress: Progress, total: int, done: int) -> None:
    on_progress(done, total)
