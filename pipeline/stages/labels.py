"""Labelled text in three splits. Those that are drawn here share no text; what a column or files say is kept."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow.parquet as pq
from annotated_types import Ge, Lt, MinLen

from pipeline import sources, targets
from pipeline.classes import SEPARATOR, class_name, class_names
from pipeline.errors import DataError
from pipeline.identity import added, knob
from pipeline.overlap import overlap
from pipeline.readers import Reading, Row, read_rows, text_of
from pipeline.sources import Source
from pipeline.splitting import (
    FILES,
    Example,
    LabelledSplit,
    SplitName,
    Splits,
    by_column,
    by_fractions,
    carve_validation,
    few_of_each,
    split_of_file,
)
from pipeline.stage import Context, Stage
from pipeline.tables import lists_of_texts, write_table
from pipeline.text import normalise

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
PROGRESS_EVERY = 1000
FEWEST_NEW = 100
"""New validation texts that are enough to fit a number or two."""


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """Where the labelled text is and which part of it is measured on."""

    path: Annotated[str, MinLen(1)] = knob()
    """File, folder, glob or saved dataset: jsonl, csv, tsv, parquet, also .gz or .zst. Only its content counts."""
    text: str = "text"
    """The field or column that holds the text."""
    label: str = "label"
    """The field or column that holds the class. Classes are strings, whatever they look like."""
    multi_label: bool = added(False)
    """A text may have several classes, or none: `label` holds a list of them, or a string, where blank is none."""
    separator: Annotated[str, MinLen(1)] = added(SEPARATOR)
    """What stands between the classes in such a string."""
    split: str | tuple[float, float, float] = (0.8, 0.1, 0.1)
    """The column that says train, validation or test; `files` where the names of files do (train.csv,
    test-00000-of-00002.parquet); or the fractions of these three, drawn by a hash of the text."""
    validation_fraction: Annotated[float, Ge(0), Lt(1)] = 0.1
    """The part of train used for validation where no validation rows are given."""
    in_time_order: bool = added(False)
    """Rows stand in the order of time. Those that are drawn to validate or test on are then the last of each class,
    since what will be classified comes after what was learned from; validation is nearer to what is to be expected."""
    split_seed: Annotated[int, Ge(0)] = added(0)
    """Another number draws other texts to validate and test on. `seed` does not, so that models stay comparable."""
    train_per_class: Annotated[int, Ge(1)] | None = added(None)
    """At most so many training rows of each class, drawn by a hash of their text, and of the validation rows as large a
    part; null is all. For learning curves.

    With multi_label the first so many of each: a class that others' rows also have gets more."""
    invalid_utf8: Literal["refuse", "repair"] = "refuse"
    """Stop at bytes that are not UTF-8, or put U+FFFD in their place and count them."""

    def __post_init__(self) -> None:
        if self.separator != SEPARATOR and not self.multi_label:
            raise ValueError(f"separator={self.separator!r} is of use with multi_label alone; set that to true")
        if isinstance(self.split, str):
            return
        train, validation, test = self.split
        if min(train, test) <= 0 or validation < 0 or not math.isclose(train + validation + test, 1, abs_tol=1e-6):
            raise ValueError(
                f"split={self.split} must be fractions of train, validation and test that sum to 1, "
                "train and test above 0: for example [0.8, 0.1, 0.1]"
            )

    @property
    def by_files(self) -> bool:
        """Whether the names of files say the split."""
        return self.split == FILES


@dataclass(frozen=True)
class Labels:
    """Labelled text on disk: one parquet file a split, with columns `text` and `label`, a class or a list of them."""

    path: Path

    @cached_property
    def names(self) -> list[str]:
        """The classes, sorted."""
        return self.counts["names"]

    @cached_property
    def counts(self) -> dict[str, Any]:
        """What `labels.json` holds: names, and rows by split and class; `multi_label` where that is true."""
        return json.loads((self.path / "labels.json").read_text())

    @property
    def multi_label(self) -> bool:
        """Whether a text may have several classes, or none."""
        return self.counts.get("multi_label", False)

    def split(self, name: SplitName) -> LabelledSplit:
        """One split, in the order of the source."""
        table = pq.read_table(self.path / f"{name}.parquet")
        encoded = targets.encode(table.column("label").to_pylist(), self.names, multi_label=self.multi_label)
        return LabelledSplit(table.column("text").to_pylist(), encoded)

    def new_validation(self) -> LabelledSplit:
        """The validation texts that do not quote the training texts: they are answered as a text of tomorrow is.

        What says how far a classifier can be trusted is fitted on these: of newsgroup posts that quote each other,
        it was right about 90 % of the validation texts, 82 % of the new ones, and 80 % of a later test. Where fewer
        than FEWEST_NEW are new, all validation texts are given.
        """
        validation = self.split("validation")
        if not validation.texts:
            return validation
        new = overlap(validation.texts, self.split("train").texts).new
        if new.sum() < FEWEST_NEW:
            return validation
        return LabelledSplit(list(compress(validation.texts, new)), validation.targets[new])


@dataclass(frozen=True, kw_only=True)
class LabelsStage(Stage[Labels]):
    """Read the labelled text once and fix its splits."""

    VERSION = 3

    config: LabelsConfig

    def sources(self) -> Mapping[str, str]:
        found = sources.digests(self.config.path, splits=self.config.by_files)
        if not self.config.by_files:
            return found
        said = [_split_of(source) for source in sources.find(self.config.path, splits=True) for _ in source.files]
        return {f"{place} {split}": digest for (place, digest), split in zip(found.items(), said, strict=True)}

    def run(self, ctx: Context) -> None:
        counts: Counter[str] = Counter()
        examples = list(_examples(self.config, ctx, counts))
        names = sorted({name for example in examples for name in example.classes})
        _check_classes(self.config, names)
        if self.config.multi_label:
            _check_several(self.config, examples, counts)
        splits = _split(self.config, examples, counts)
        _write(ctx.out, splits, names, multi_label=self.config.multi_label)
        ctx.notes["metrics"] = _metrics(splits, names, counts)
        rows = " / ".join(f"{len(chosen):,}" for chosen in splits.values())
        doubt = _mixed(self.config) + ("" if self.config.multi_label else _doubt(names))
        ctx.notes["headline"] = f"{len(names)} classes, {rows} texts ({' / '.join(splits)}){doubt}"
        ctx.notes["duplicates_across_splits"] = counts["duplicates_across_splits"]
        digest = sources.digest(self.config.path, splits=self.config.by_files)
        ctx.notes["datasets"] = [sources.described(self.config.path, digest, "labels")]

    def load(self, path: Path) -> Labels:
        return Labels(path)


def _examples(config: LabelsConfig, ctx: Context, counts: "Counter[str]") -> Iterator[Example]:
    columns = [config.text, config.label]
    columns += [config.split] if isinstance(config.split, str) and not config.by_files else []
    how = Reading(
        repair=config.invalid_utf8 == "repair", on_read=lambda count: counts.update(bytes_read=count), counts=counts
    )
    found = sources.find(config.path, splits=config.by_files)
    total = sum(source.n_bytes for source in found)
    for source in found:
        split = _split_of(source) if config.by_files else ""
        for row in read_rows(source, columns, how):
            counts["read"] += 1
            if counts["read"] % PROGRESS_EVERY == 0:
                ctx.tracker.progress(counts["bytes_read"], total, f"{counts['read']:,} rows")
            example = _example(config, source, row, split, counts)
            counts["lists"] += isinstance(row.values[1], list)
            counts["blank"] += not example
            if example:
                yield example
    ctx.tracker.progress(total, total, f"{counts['read']:,} rows")


def _split_of(source: Source) -> SplitName:
    return split_of_file(source.name, str(source.path))


def _example(config: LabelsConfig, source: Source, row: Row, split: str, counts: "Counter[str]") -> Example | None:
    """A row as an example; None if its text is blank. `split` is that of its file, where no column says it."""
    where = f"{source.path}:{row.line}"
    text = normalise(text_of(row, source, config.text), counts)
    at = f"{where}: {config.label}"
    label = class_names(row.values[1], at, config.separator) if config.multi_label else class_name(row.values[1], at)
    split = str(row.values[2]) if len(row.values) > 2 else split
    return Example(text, label, split, where) if text.strip() else None


def _check_classes(config: LabelsConfig, names: list[str]) -> None:
    where = Path(config.path).absolute()
    if not names:
        raise DataError(f"{where}: no labelled text in it. Give rows with {config.text!r} and {config.label!r}")
    if len(names) == 1:
        which = "no class but" if config.multi_label else "the class"
        raise DataError(f"{where}: every row has {which} {names[0]!r}. A classifier needs two or more")


def _check_several(config: LabelsConfig, examples: list[Example], counts: "Counter[str]") -> None:
    """Raises DataError where the strings of a file look like one class each."""
    if counts["lists"] or any(len(example.classes) != 1 for example in examples):
        return
    raise DataError(
        f"{examples[0].where}: {config.label} is {examples[0].classes[0]!r:.60}, one class, and so it is in all "
        f"{len(examples):,} rows. Set labels.multi_label to false, or labels.separator to what stands between classes "
        f"(it is {config.separator!r})"
    )


def _mixed(config: LabelsConfig) -> str:
    """What to say where files are named after splits, and yet these are drawn."""
    if isinstance(config.split, str):
        return ""
    said: set[SplitName] = set()
    for source in sources.find(config.path):
        with suppress(DataError):
            said.add(_split_of(source))
    return "; files are named after splits: is labels.split: files meant?" if len(said) > 1 else ""


def _doubt(names: list[str]) -> str:
    """What to say where classes look like several others in one string."""
    known = set(names)
    joined = [
        name for name in names if SEPARATOR in name and known.issuperset(part.strip() for part in name.split(SEPARATOR))
    ]
    return f"; {joined[0]!r} looks like several classes: is labels.multi_label meant?" if joined else ""


def _split(config: LabelsConfig, examples: list[Example], counts: "Counter[str]") -> Splits:
    seed = config.split_seed
    if isinstance(config.split, str):
        splits = by_column(examples, config.split)
    else:
        splits = by_fractions(examples, config.split, seed, in_time_order=config.in_time_order)
    if not splits["validation"]:
        splits = carve_validation(splits, config.validation_fraction, seed, in_time_order=config.in_time_order)
    if config.train_per_class is not None:
        splits |= _few(splits, config.train_per_class, seed)
    if not splits["test"]:
        where = Path(config.path).absolute()
        raise DataError(f"{where}: no row falls to test, so nothing could be measured. Give test rows or more rows")
    if not any(example.classes for example in splits["test"]):
        raise DataError(f"{splits['test'][0].where}: no test row has a class, so nothing could be measured")
    counts.update(_repeats(splits))
    return splits


def _few(splits: Splits, most: int, seed: int) -> Splits:
    """So many training rows of each class at most, and of the validation rows no larger a part."""
    train, validation = splits["train"], splits["validation"]
    most_to_validate = math.ceil(most * len(validation) / len(train))
    return {
        "train": few_of_each(train, most, seed),
        "validation": few_of_each(validation, most_to_validate, seed) if validation else [],
    }


def _repeats(splits: Mapping[SplitName, list[Example]]) -> dict[str, int]:
    """Rows that repeat a text, texts that stand in more than one split, and texts with more than one class."""
    in_splits = Counter(text for rows in splits.values() for text in {row.text for row in rows})
    classes = Counter(text for text, _ in {(row.text, row.label) for rows in splits.values() for row in rows})
    return {
        "duplicates": sum(len(rows) for rows in splits.values()) - len(in_splits),
        "duplicates_across_splits": sum(count > 1 for count in in_splits.values()),
        "conflicting_classes": sum(count > 1 for count in classes.values()),
    }


def _write(out: Path, splits: Mapping[SplitName, list[Example]], names: list[str], *, multi_label: bool) -> None:
    record: dict[str, Any] = {"names": names, "rows": {}, "classes": {}}
    record |= {"multi_label": True} if multi_label else {}
    for split in SPLITS:
        labels: Any = [example.label for example in splits[split]]
        column = lists_of_texts(labels) if multi_label else labels
        write_table(out / f"{split}.parquet", {"text": [example.text for example in splits[split]], "label": column})
        record["rows"][split] = len(labels)
        record["classes"][split] = dict(Counter(name for example in splits[split] for name in example.classes))
    (out / "labels.json").write_text(json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _metrics(splits: Mapping[SplitName, list[Example]], names: list[str], counts: "Counter[str]") -> dict[str, float]:
    met = ("read", "blank", "repaired", "texts_with_nul")
    extra = (*met, "duplicates", "duplicates_across_splits", "conflicting_classes")
    rows = {f"{split}_rows": float(len(splits[split])) for split in SPLITS}
    return {"classes": float(len(names)), **rows, **{name: float(counts[name]) for name in extra}}
