"""Labelled texts out of a file, for measuring: the rows of one split, their classes as numbers of a model's classes."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import sources
from pipeline.errors import DataError
from pipeline.readers import Reading, Row, read_rows, text_of
from pipeline.sources import Source
from pipeline.splitting import NAMES, LabelledSplit
from pipeline.stages.labels import class_name
from pipeline.text import normalise

SPLIT = "split"
"""The column that says which split a row is of, where there is one."""
ALL = "all"
MOST_NAMES = 12

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much."""


def silent(what: str, done: int, total: int) -> None:
    """A `Progress` that says nothing."""
    del what, done, total


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where text and class stand in a file, and which rows count: a split by name, or `all`.

    Without a name the test rows are taken, or all where no column is called `split`.
    """

    text: str = "text"
    label: str = "label"
    split: str | None = None


@dataclass(frozen=True)
class Labelled:
    """Texts with their classes by name, where each stands (`file:line`), and which split it is. Blank texts are out."""

    texts: list[str]
    labels: list[str]
    places: list[str]
    split: str
    blank: int

    def known_to(self, names: Sequence[str], model: str) -> LabelledSplit:
        """The classes as places in `names`. Raises DataError where a class is none of them."""
        number = {name: i for i, name in enumerate(names)}
        if unknown := sorted(set(self.labels) - number.keys()):
            raise DataError(self._unknown(unknown, names, model))
        return LabelledSplit(self.texts, np.array([number[label] for label in self.labels], dtype=np.int64))

    def _unknown(self, unknown: Sequence[str], names: Sequence[str], model: str) -> str:
        first = next(i for i, label in enumerate(self.labels) if label in unknown)
        others = [name for name in unknown if name != self.labels[first]]
        also = f", nor {_listed(others)}" if others else ""
        rows = sum(label in unknown for label in self.labels)
        return (
            f"{self.places[first]}: {model} does not know the class {self.labels[first]!r}{also} ({rows:,} rows). "
            f"It knows {_listed(names)}. Rename the classes, leave these rows out, or name another column: --label"
        )


def read_labelled(path: Path, columns: Columns, on_progress: Progress = silent) -> Labelled:
    """The wanted rows of a file, folder or glob. Raises DataError with file and line for what cannot be used."""
    found = sources.find(str(path))
    has_split = _has_split(found[0], columns)
    split = columns.split or ("test" if has_split else ALL)
    rows: list[tuple[str, str, str]] = []
    blank, splits = 0, Counter[str]()
    for source, row in _rows(found, columns, has_split, on_progress):
        named = _canonical(str(row.values[2])) if has_split else ALL
        splits[named] += 1
        if _canonical(split) not in (named, ALL):
            continue
        where = f"{source.path}:{row.line}"
        text = normalise(text_of(row, source, columns.text))
        label = class_name(row.values[1], f"{where}: {columns.label}")
        blank += not text.strip()
        if text.strip():
            rows.append((text, label, where))
    if not rows:
        there = ", ".join(f"{name} ({count:,})" for name, count in splits.most_common()) or "no rows at all"
        raise DataError(f"{path}: no labelled text of the split {split!r} in it. There are: {there}. Name one: --split")
    texts, labels, places = map(list, zip(*rows, strict=True))
    return Labelled(texts, labels, places, split, blank)


def _has_split(source: Source, columns: Columns) -> bool:
    """Whether the first row has a split. A file that cannot be read is refused when its texts are."""
    if columns.split == ALL:
        return False
    try:
        next(read_rows(source, [SPLIT], Reading()), None)
    except DataError:
        if columns.split is None:
            return False
        next(read_rows(source, [columns.text, columns.label, SPLIT], Reading()), None)
    return True


def _rows(
    found: Sequence[Source], columns: Columns, has_split: bool, on_progress: Progress
) -> Iterator[tuple[Source, Row]]:
    wanted = [columns.text, columns.label, *([SPLIT] if has_split else [])]
    total, counts = sum(source.n_bytes for source in found), Counter[str]()
    how = Reading(on_read=lambda n_bytes: counts.update(read=n_bytes), counts=counts)
    for source in found:
        for row in read_rows(source, wanted, how):
            on_progress("bytes read", min(counts["read"], total), total)
            yield source, row


def _canonical(split: str) -> str:
    name = split.strip().lower()
    return NAMES.get(name, name)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(map(repr, names[:MOST_NAMES])) + (f" and {more} more" if more > 0 else "")
