"""Labelled texts out of a file, for measuring: the rows of one split, their classes as numbers of a model's classes."""

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import sources
from pipeline.classes import SEPARATOR, class_name, class_names
from pipeline.errors import DataError
from pipeline.readers import Reading, Row, read_rows, text_of
from pipeline.sources import Source
from pipeline.splitting import NAMES, LabelledSplit, SplitName, split_of_file
from pipeline.targets import encode
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

    Without a name the test rows are taken, or all where neither a column called `split` nor the names of several files
    say which those are. `separator` stands between the classes of a text where it may have several and they come as one
    string.
    """

    text: str = "text"
    label: str = "label"
    split: str | None = None
    separator: str = SEPARATOR


@dataclass(frozen=True)
class Labelled:
    """Texts with their classes by name, where each stands (`file:line`), and which split it is. Blank texts are out.

    A label is a class or, with `multi_label`, a tuple of classes.
    """

    texts: list[str]
    labels: list[str | tuple[str, ...]]
    places: list[str]
    split: str
    blank: int
    multi_label: bool = False

    def known_to(self, names: Sequence[str], model: str) -> LabelledSplit:
        """The classes as places in `names`. Raises DataError where a class is none of them."""
        met = {name for classes in self._classes for name in classes}
        if unknown := sorted(met - set(names)):
            raise DataError(self._unknown(unknown, names, model))
        return LabelledSplit(self.texts, encode(self.labels, names, multi_label=self.multi_label))

    def without(self, texts: Container[str]) -> "Labelled":
        """These, less some texts."""
        kept = [i for i, text in enumerate(self.texts) if text not in texts]
        texts_, labels, places = ([column[i] for i in kept] for column in (self.texts, self.labels, self.places))
        return replace(self, texts=texts_, labels=labels, places=places)

    @property
    def _classes(self) -> list[tuple[str, ...]]:
        return [(label,) if isinstance(label, str) else label for label in self.labels]

    def _unknown(self, unknown: Sequence[str], names: Sequence[str], model: str) -> str:
        rows = [i for i, classes in enumerate(self._classes) if not set(unknown).isdisjoint(classes)]
        first = next(name for name in self._classes[rows[0]] if name in unknown)
        others = [name for name in unknown if name != first]
        also = f", nor {_listed(others)}" if others else ""
        separated = ", or what stands between classes (--separator)" if self.multi_label else ""
        return (
            f"{self.places[rows[0]]}: {model} does not know the class {first!r}{also} ({len(rows):,} rows). "
            f"It knows {_listed(names)}. Rename the classes, leave these rows out, or have evaluate and compare "
            f"read another column (--label){separated}"
        )


def read_labelled(
    path: Path, columns: Columns, on_progress: Progress = silent, *, multi_label: bool = False
) -> Labelled:
    """The wanted rows of a file, folder, glob or saved dataset; with `multi_label` a text may have several classes, or
    none.

    Raises DataError with file and line for what cannot be used.
    """
    found = sources.find(str(path), splits=True)
    has_split = columns.split != ALL and _has_split(found[0])
    of_files = {} if has_split or columns.split == ALL else _splits_of_files(found)
    has_split = has_split or (columns.split not in (None, ALL) and not of_files)  # reading says that it is missing
    split = columns.split or ("test" if has_split or of_files else ALL)
    rows: list[tuple[str, str | tuple[str, ...], str]] = []
    blank, splits = 0, Counter[str]()
    for source, row in _rows(found, columns, has_split, on_progress):
        named = _canonical(str(row.values[2])) if has_split else of_files.get(source.name, ALL)
        splits[named] += 1
        if _canonical(split) not in (named, ALL):
            continue
        where = f"{source.path}:{row.line}"
        text = normalise(text_of(row, source, columns.text))
        label = _label(row.values[1], f"{where}: {columns.label}", columns.separator if multi_label else None)
        blank += not text.strip()
        if text.strip():
            rows.append((text, label, where))
    if not rows:
        if blank:
            raise DataError(f"{path}: the {columns.text} of each of its {blank:,} rows of the split {split!r} is blank")
        there = ", ".join(f"{name} ({count:,})" for name, count in splits.most_common()) or "no rows at all"
        raise DataError(
            f"{path}: no labelled text of the split {split!r} in it. There are: {there}. evaluate and compare take "
            "another (--split)"
        )
    texts, labels, places = map(list, zip(*rows, strict=True))
    return Labelled(texts, labels, places, split, blank, multi_label)


def _label(value: object, where: str, separator: str | None) -> str | tuple[str, ...]:
    """The class of a row; the classes, where there is something to stand between them."""
    return class_name(value, where) if separator is None else class_names(value, where, separator)


def _splits_of_files(found: Sequence[Source]) -> dict[str, SplitName]:
    """The split of each file by its name, where some are named after one and some after another."""
    said: set[SplitName] = set()
    for source in found:
        with suppress(DataError):
            said.add(split_of_file(source.name, str(source.path)))
    return {source.name: split_of_file(source.name, str(source.path)) for source in found} if len(said) > 1 else {}


def _has_split(source: Source) -> bool:
    """Whether the first row has a split. A file that cannot be read is refused when its texts are."""
    try:
        next(read_rows(source, [SPLIT], Reading()), None)
    except DataError:
        return False
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
