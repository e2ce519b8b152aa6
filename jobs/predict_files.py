"""Label every row of a file: its rows with columns added, in the same order, in a file of the same kind."""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from jobs.home import home
from jobs.models import locate
from jobs.run import tracking_uri
from jobs.scoring import scoring
from pipeline import export
from pipeline.annotate import check_target, writing
from pipeline.classes import SEPARATOR
from pipeline.errors import DataError, UsageError
from pipeline.pieces import FAMILIES, Piece, read_pieces, source_of
from pipeline.readers import Reading
from pipeline.sources import COMPRESSIONS
from pipeline.targets import Targets, answered, confidence, decode, is_multi_label, members, shown

DIGITS = 6
TERMINAL_SECONDS, LOG_SECONDS = 0.5, 10.0


@dataclass(frozen=True, kw_only=True)
class Order:
    """What `gristmill predict MODEL --input FILE` asks for."""

    model: str
    input: str
    output: Path | None = None
    text: str = "text"
    probabilities: bool = False
    prefix: str = ""
    separator: str = SEPARATOR
    """Between the labels of a row, in files that have no lists."""
    precision: str = "fp32"
    workers: int = 1
    force: bool = False


def predict_file(order: Order) -> dict[str, Any]:
    """Write the rows of a file with `label` and `confidence` added; `{rows, seconds, rows_per_second, output, labels}`.

    Of a classifier that may give a text several labels, `label` is a list, or in csv and tsv a string of them.
    The output appears whole at the end, or not at all. Raises UsageError, DataError, EnvironmentProblem, WorkerLost.
    """
    source = source_of(order.input)
    target = order.output or default_target(source.path)
    check_target(source, target)
    _check_free(source.path, target, order.force)
    folder = locate(order.model, home(), tracking_uri())
    loaded = export.read(folder).loaded
    added = column_names(order, loaded.labels)
    joined = FAMILIES[source.kind] == "CSV"
    if loaded.multi_label and joined:
        _check_separator(loaded.labels, order.separator)
    counts: Counter[int] = Counter()
    progress = Progress(source.n_bytes)
    pieces = _some(read_pieces(source, order.text, added, Reading(on_read=progress.read)), order.input)
    try:
        with writing(target) as write, scoring(folder, loaded, order.precision, order.workers) as score:
            for piece, table in score(pieces):
                answers = answered(table, multi_label=loaded.multi_label)
                write(piece, _columns(order, loaded.labels, table, answers, joined=joined))
                counts.update(dict(enumerate(members(answers, len(loaded.labels)).sum(axis=0).tolist())))
                progress.labelled(len(piece.texts))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Interrupted. Nothing was written; the same command begins anew.") from None
    labels = {name: counts[i] for i, name in enumerate(loaded.labels)}
    return {**progress.result(), "output": str(target), "labels": labels}


def default_target(path: Path) -> Path:
    """`data.jsonl.gz` becomes `data.predictions.jsonl.gz`, beside it; parquet, compressed in itself, loses its .gz."""
    compression = path.suffix if path.suffix.lower() in COMPRESSIONS else ""
    inner = path.with_name(path.name.removesuffix(compression))
    ending = inner.suffix if inner.suffix.lower() == ".parquet" else inner.suffix + compression
    return path.with_name(f"{inner.stem}.predictions{ending}")


def _check_free(source: Path, target: Path, force: bool) -> None:
    if target.exists() and target.samefile(source):
        raise UsageError(f"{target}: the output would replace its own input. Give another --output")
    if target.exists() and not force:
        raise UsageError(f"{target}: there is such a file already. Give another --output, or --force to replace it")


def _check_separator(labels: Sequence[str], separator: str) -> None:
    within = [label for label in labels if separator in label]
    if within:
        raise UsageError(
            f"--separator {separator!r} is a part of the label {within[0]!r}, so the labels of a row could not be told "
            "apart. Give another"
        )


def column_names(order: Order, labels: Sequence[str]) -> list[str]:
    """The columns that are added: first the label, then the confidence, then, if asked for, `p_LABEL` for each."""
    names = ["label", "confidence", *(f"p_{label}" for label in labels if order.probabilities)]
    return [order.prefix + name for name in names]


def _columns(
    order: Order, labels: Sequence[str], table: np.ndarray, answers: Targets, *, joined: bool
) -> dict[str, list[Any]]:
    """`joined`: several labels as one string, for a file that has no lists."""
    named = decode(answers, labels)
    named = [shown(label, order.separator) for label in named] if joined else named
    sure = confidence(table, multi_label=is_multi_label(answers))
    values = [named, _rounded(sure)]
    values += [_rounded(table[:, place]) for place in range(len(labels)) if order.probabilities]
    return dict(zip(column_names(order, labels), values, strict=True))


def _rounded(column: np.ndarray) -> list[float]:
    return [round(value, DIGITS) for value in column.tolist()]


def _some(pieces: Iterator[Piece], path: str) -> Iterator[Piece]:
    """The pieces, the first of them read at once, so that a file that cannot be used costs nothing more."""
    first = next(pieces, None)
    if first is None:
        raise DataError(f"{path}: no rows in this file")
    return chain([first], pieces)


class Progress:
    """Rows labelled, and how fast, on stderr: one line that changes on a terminal, else a line now and then."""

    def __init__(self, total_bytes: int) -> None:
        self._total, self._bytes, self._rows = max(1, total_bytes), 0, 0
        self._start = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def read(self, n_bytes: int) -> None:
        self._bytes += n_bytes

    def labelled(self, rows: int) -> None:
        self._rows += rows
        now = time.monotonic()
        if now - self._shown >= (TERMINAL_SECONDS if self._terminal else LOG_SECONDS):
            self._shown = now
            sys.stderr.write(f"\r\033[K{self._line()}" if self._terminal else f"{self._line()}\n")
            sys.stderr.flush()

    def _line(self) -> str:
        rate = self._rows / max(time.monotonic() - self._start, 1e-9)
        return f"{self._rows:,} rows  {rate:,.0f} rows/s  {min(100, 100 * self._bytes // self._total)} % read"

    def result(self) -> dict[str, Any]:
        """`{rows, seconds, rows_per_second}`. The seconds are those of reading, labelling and writing."""
        if self._terminal:
            sys.stderr.write("\r\033[K")
        seconds = time.monotonic() - self._start
        return {
            "rows": self._rows,
            "seconds": round(seconds, 3),
            "rows_per_second": round(self._rows / max(seconds, 1e-9), 1),
        }
