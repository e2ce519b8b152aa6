"""Which split a labelled text is of: a column, its file, a hash or its place says it.

Where it is drawn, texts that differ in nothing but case and blanks stay together.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, NamedTuple

from pipeline.errors import DataError
from pipeline.targets import Targets
from pipeline.text import unit_hash

SplitName = Literal["train", "validation", "test"]

NAMES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""What a split column may say, or a word in the name of a file, in any case of letters."""

FILES = "files"
"""In place of a column: the names of the files say it."""

NO_CLASS = ""
"""What rows without a class count as; no class has this name."""


class Example(NamedTuple):
    """A labelled text. `split` is what the split column says, `where` the file and line it comes from.

    `label` is its class or, where a text may have several, a tuple of them.
    """

    text: str
    label: str | tuple[str, ...]
    split: str
    where: str

    @property
    def classes(self) -> tuple[str, ...]:
        return (self.label,) if isinstance(self.label, str) else self.label


@dataclass(frozen=True)
class LabelledSplit:
    """Texts, and the classes of each, as places in `Labels.names`."""

    texts: list[str]
    targets: Targets


Splits = dict[SplitName, list[Example]]


def split_of_file(name: str, where: str) -> SplitName:
    """What the name of a file says, or of the nearest folder above that says anything, as test-00000-of-00002.parquet.

    Raises DataError that begins with `where` if none does, or one says two things.
    """
    for part in reversed(PurePath(name).parts):
        said: set[SplitName] = {NAMES[word] for word in re.findall("[a-z]+", part.lower()) if word in NAMES}
        if len(said) > 1:
            raise DataError(f"{where}: {part!r} says {' and '.join(sorted(said))}. Name the file after its split alone")
        if said:
            return said.pop()
    raise DataError(
        f"{where}: no word of its name says whether its rows are to train, validate or test on. "
        "Rename it, as train.csv, or give a glob that leaves it out"
    )


def by_column(examples: Sequence[Example], column: str) -> Splits:
    """The splits that a column names. Raises DataError for another name, or a class that train does not have."""
    splits: Splits = {"train": [], "validation": [], "test": []}
    for example in examples:
        name = NAMES.get(example.split.strip().lower())
        if name is None:
            raise DataError(f"{example.where}: {column} is {example.split!r:.60}. Write train, validation or test")
        splits[name].append(example)
    _check_known(splits)
    return splits


def _check_known(splits: Splits) -> None:
    known = _classes(splits["train"])
    measured = [*splits["validation"], *splits["test"]]
    unknown = ((row, name) for row in measured for name in row.classes if name not in known)
    for row, name in unknown:
        raise DataError(
            f"{row.where}: the class {name!r} of this {row.split} row is in no train row, "
            "so it cannot be learned. Add train rows of it, or leave the row out"
        )


def _classes(examples: Iterable[Example]) -> set[str]:
    return {name for example in examples for name in example.classes}


def alike(text: str) -> str:
    """What texts have in common that differ in case and blanks alone."""
    return " ".join(text.casefold().split())


def by_fractions(
    examples: Sequence[Example], fractions: tuple[float, float, float], seed: int, *, in_time_order: bool = False
) -> Splits:
    """Splits of about these fractions. A class too rare to have fallen to train goes there whole."""
    train, validation, _ = fractions
    split_of: dict[str, SplitName] = {}
    for like, share in (_places(examples) if in_time_order else _drawn(examples, f"split {seed}")).items():
        split_of[like] = "train" if share < train else "validation" if share < train + validation else "test"
    return _divide(examples, split_of)


def carve_validation(splits: Splits, fraction: float, seed: int, *, in_time_order: bool = False) -> Splits:
    """Validation rows out of train, about this fraction; no class leaves train.

    It is one text at least, unless the fraction is 0 or every class has a single one.
    """
    assert not splits["validation"], "there are validation rows already"
    train = splits["train"]
    if not fraction or not train:
        return splits
    shares = _drawn(train, f"validation {seed}")
    if in_time_order:
        shares = {like: 1 - place for like, place in _places(train).items()}
    carved = _divide(train, {like: "validation" if share <= fraction else "train" for like, share in shares.items()})
    if not carved["validation"] and (spare := _spare(train)):
        lowest = min(shares[like] for like in spare)
        carved = _divide(train, {like: "validation" if share == lowest else "train" for like, share in shares.items()})
    return {**carved, "test": splits["test"]}


def _spare(examples: Sequence[Example]) -> list[str]:
    """What is alike of texts whose classes other texts have too."""
    likes = [alike(example.text) for example in examples]
    having: defaultdict[str, set[str]] = defaultdict(set)
    for like, example in zip(likes, examples, strict=True):
        for name in example.classes:
            having[name].add(like)
    return [
        like
        for like, example in zip(likes, examples, strict=True)
        if all(len(having[name]) > 1 for name in example.classes)
    ]


def _drawn(examples: Iterable[Example], purpose: str) -> dict[str, float]:
    """A number in [0, 1) for what is alike, by the hash of the first, in order of characters, of the texts that are."""
    first: dict[str, str] = {}
    for text in {example.text for example in examples}:
        like = alike(text)
        first[like] = min(text, first.get(like, text))
    return {like: unit_hash(text, purpose) for like, text in first.items()}


def _places(examples: Sequence[Example]) -> dict[str, float]:
    """How far down the rows of its class a text first stands, in (0, 1), for what is alike of texts.

    Of all rows where a text may have several classes.
    """
    groups = [example.label if isinstance(example.label, str) else "" for example in examples]
    sizes, before = Counter(groups), Counter[str]()
    places: dict[str, float] = {}
    for example, group in zip(examples, groups, strict=True):
        places.setdefault(alike(example.text), (before[group] + 0.5) / sizes[group])
        before[group] += 1
    return places


def few_of_each(examples: Sequence[Example], most: int, seed: int) -> list[Example]:
    """At most so many examples of each class, in their order; a larger number keeps those of a smaller one.

    Where a text may have several classes, the first `most` of each, in the order of a hash, so that a class may get
    more by the rows that it shares with others; rows without a class count as a class of their own.
    """
    met: Counter[str] = Counter()
    chosen: set[int] = set()
    for i in sorted(range(len(examples)), key=lambda i: unit_hash(examples[i].text, f"few {seed}")):
        classes = examples[i].classes or (NO_CLASS,)
        if any(met[name] < most for name in classes):
            chosen.add(i)
        met.update(classes)
    return [example for i, example in enumerate(examples) if i in chosen]


def _divide(examples: Sequence[Example], split_of: Mapping[str, SplitName]) -> Splits:
    """Examples by the split of what is alike, after every text of a class that train would lack has gone to train."""
    rows = [(alike(example.text), example) for example in examples]
    known = _classes(example for like, example in rows if split_of[like] == "train")
    moved = {like for like, example in rows if not known.issuperset(example.classes)}
    splits: Splits = {"train": [], "validation": [], "test": []}
    for like, example in rows:
        splits["train" if like in moved else split_of[like]].append(example)
    return splits
