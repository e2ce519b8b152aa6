"""Rows out of text, JSON lines, CSV, parquet and saved datasets, one at a time; errors name the file and the line."""

import csv
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.classes import Names, by_name, class_label_names
from pipeline.errors import DataError
from pipeline.sources import SAVED_DATASET, Source
from pipeline.streams import open_bytes, readable
from pipeline.text import decode, refuse_binary

MAX_LINE_BYTES = 32 << 20
"""A longer line of JSON or CSV is refused, since it must be in memory whole."""
MAX_PIECE_BYTES = 4 << 20
"""A longer line or file of plain text comes as several rows."""
BATCH_ROWS = 256
BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """The wanted values of one record, and the line (or the row of a table) that it starts on, counted from 1."""

    line: int
    values: tuple[Any, ...]


def _ignore(count: int) -> None:
    del count


@dataclass(frozen=True)
class Reading:
    """How files are read. `counts` gathers what was met: `repaired` (invalid UTF-8), `cut` (too long for one row)."""

    repair: bool = False
    whole_files: bool = False
    on_read: Callable[[int], None] = _ignore
    counts: "Counter[str]" = field(default_factory=Counter)


def read_rows(source: Source, columns: Sequence[str], how: Reading) -> Iterator[Row]:
    """The rows of a source in order, values in the order of `columns`; plain text has one value. Raises DataError."""
    if source.kind == SAVED_DATASET:
        return _saved_rows(source, columns, how)
    return _READERS[source.kind](source, columns, how)


def _text_rows(source: Source, columns: Sequence[str], how: Reading) -> Iterator[Row]:
    if len(columns) > 1:
        needed = ", ".join(columns)
        raise DataError(f"{source.path}: plain text has no columns, but {needed} are needed. Give jsonl or csv")
    with open_bytes(source, how.on_read) as stream:
        yield from plain_rows(stream, source, how)


def plain_rows(stream: IO[bytes], source: Source, how: Reading, first: int = 1, rest: bytes = b"") -> Iterator[Row]:
    """The lines of a text from the `first` on, without their ends, or, with `how.whole_files`, the whole of it.

    What is too long for one row comes as several. `rest` has already been read.
    """
    for line, data in _pieces(stream, source, how, first, rest):
        text = _decoded(data, source, line, how)
        yield Row(line, (text if how.whole_files else text.rstrip("\r\n"),))


def _pieces(stream: IO[bytes], source: Source, how: Reading, line: int, rest: bytes) -> Iterator[tuple[int, bytes]]:
    read = stream.read if how.whole_files else stream.readline
    at_start = line == 1 and source.is_from_start
    while data := rest + read(MAX_PIECE_BYTES - len(rest)):
        data, at_start = data.removeprefix(BOM) if at_start else data, False
        if not data:  # there is nothing but a BOM
            return
        whole = len(data) < MAX_PIECE_BYTES - len(BOM) or (not how.whole_files and data.endswith(b"\n"))
        stop = len(data) if whole else _last_break(data)
        how.counts["cut"] += not whole
        yield line, data[:stop]
        line, rest = line + data.count(b"\n", 0, stop), data[stop:]


def _last_break(data: bytes) -> int:
    """Where to cut bytes that go on: after a space in the second half, or else before the last character."""
    space = max(data.rfind(b" "), data.rfind(b"\n")) + 1
    if space > len(data) // 2:
        return space
    starts = (i for i in range(len(data) - 1, len(data) - 5, -1) if data[i] & 0xC0 != 0x80)
    return next(starts, len(data))


def lines(stream: IO[bytes], source: Source, how: Reading, first: int = 1) -> Iterator[tuple[int, str]]:
    """Each line with its number, counted from `first`."""
    for line, data in enumerate(iter(partial(stream.readline, MAX_LINE_BYTES), b""), first):
        if len(data) == MAX_LINE_BYTES:
            size = f"{MAX_LINE_BYTES >> 20} MiB"
            raise DataError(f"{source.path}:{line}: a line of {size} or more. Break it into records")
        data = data.removeprefix(BOM) if line == 1 and source.is_from_start else data
        yield line, _decoded(data, source, line, how)


def _decoded(data: bytes, source: Source, line: int, how: Reading) -> str:
    """Bytes that are text as they stand, where a NUL says that they are none."""
    text = decode(data, str(source.path), line, repair=how.repair, counts=how.counts)
    refuse_binary(text, str(source.path), line)
    return text


def _json_rows(source: Source, columns: Sequence[str], how: Reading) -> Iterator[Row]:
    with open_bytes(source, how.on_read) as stream:
        yield from json_rows(stream, source, columns, how)


def json_rows(stream: IO[bytes], source: Source, columns: Sequence[str], how: Reading, first: int = 1) -> Iterator[Row]:
    """The records of lines of JSON, the `first` of them and what follows; blank ones are passed over."""
    for line, text in lines(stream, source, how, first):
        if text.strip():
            yield Row(line, _json_values(text, columns, f"{source.path}:{line}"))


def _json_values(text: str, columns: Sequence[str], where: str) -> tuple[Any, ...]:
    record = json_record(text, where)
    try:
        return tuple([record[name] for name in columns])
    except KeyError:
        check_columns(where, list(record), columns)
        raise


def json_record(text: str, where: str) -> dict[str, Any]:
    """The object that a line of JSON holds. Raises DataError that begins with `where`, a file and line."""
    try:
        record = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{where}:{error.colno}: not valid JSON: {error.msg}. Give one JSON object a line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}. Give one JSON object a line")
    return record


def check_columns(where: str, present: Sequence[str], columns: Sequence[str]) -> None:
    """Raises DataError that begins with `where` unless each of `columns` is there once."""
    for name in columns:
        if name not in present:
            names = ", ".join(map(repr, present)) or "none"
            raise DataError(f"{where}: no column {name!r}. There are: {names}. Name one of them")
        if present.count(name) > 1:
            raise DataError(f"{where}: more than one column is called {name!r}. Rename all but one")


def _csv_rows(source: Source, columns: Sequence[str], how: Reading) -> Iterator[Row]:
    with open_bytes(source, how.on_read) as stream:
        records = csv_records((text for _, text in lines(stream, source, how)), source)
        line, header = next(records, (1, []))
        if not header:
            return
        check_columns(f"{source.path}:{line}", header, columns)
        places = [header.index(name) for name in columns]
        for line, record in records:
            yield Row(line, tuple(record[place] for place in places))


def csv_records(texts: Iterator[str], source: Source) -> Iterator[tuple[int, list[str]]]:
    """The header of a CSV or TSV file, then its rows, each with the line it starts on; blank ones are left out.

    Raises DataError for what is not CSV, for a row that is longer or shorter than the header, and where a quote may
    have swallowed rows.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    width = 0
    for line, record in _numbered(csv.reader(texts, delimiter=delimiter(source.kind), strict=True), source):
        width = width or len(record)
        if source.kind == ".tsv" and (n_lines := _rows_in_quotes(record, width)):
            raise DataError(
                f"{source.path}:{line}: quotes hold what looks like {n_lines} rows. A text that begins with a quote is "
                'put in quotes, with those in it doubled ("""Yes"", he said"), or save the file as CSV or JSON lines'
            )
        if len(record) != width:
            fields = f"{len(record)} fields, but the header has {width}"
            raise DataError(f"{source.path}:{line}: {fields}. Put texts with commas in quotes")
        yield line, record


def _rows_in_quotes(record: Sequence[str], width: int) -> int:
    """How many lines a record spans if each has the tabs of a row: many TSV files mean nothing by a quote. 0 if not."""
    spanned = "\t".join(record).split("\n")
    each_is_a_row = width > 1 and all(line.count("\t") == width - 1 for line in spanned)
    return len(spanned) if len(spanned) > 1 and each_is_a_row else 0


def delimiter(kind: str) -> str:
    """What stands between two fields of a CSV or TSV file."""
    return "\t" if kind == ".tsv" else ","


def _numbered(reader: Any, source: Source) -> Iterator[tuple[int, list[str]]]:
    """Records with the line each starts on, which a reader does not count: a quoted field may hold line ends."""
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{source.path}:{line}: not valid CSV: {error}. Check the quotes of this record") from error
        if record is None:
            return
        if record:
            yield line, record


def _parquet_rows(source: Source, columns: Sequence[str], how: Reading) -> Iterator[Row]:
    with readable(source.path), seekable(source) as place, pq.ParquetFile(place, pre_buffer=False) as file:
        check_columns(str(source.path), file.schema_arrow.names, columns)
        batches = file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns))
        names = [class_label_names(file.schema_arrow.metadata, column) for column in columns]
        yield from _table_rows(batches, source, columns, names, how, source.n_bytes / max(1, file.metadata.num_rows))


@contextmanager
def seekable(source: Source) -> Iterator[Any]:
    """Parquet is read from its end, so a compressed one is unpacked first, on disk."""
    if not source.compression:
        yield source.path
        return
    with open_bytes(source, _ignore) as packed, tempfile.TemporaryFile() as spool:
        shutil.copyfileobj(packed, spool)
        yield spool


def _saved_rows(source: Source, columns: Sequence[str], how: Reading) -> Iterator[Row]:
    from datasets import Dataset  # two seconds to import, and seldom needed

    with readable(source.path):
        try:
            dataset = Dataset.load_from_disk(str(source.path))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{source.path}: not a dataset that save_to_disk wrote: {error}. Save it again") from error
        check_columns(str(source.path), dataset.column_names, columns)
        tables = dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=BATCH_ROWS)
        names = [class_label_names(dataset.features.arrow_schema.metadata, column) for column in columns]
        yield from _table_rows(tables, source, columns, names, how, source.n_bytes / max(1, len(dataset)))


def _table_rows(
    batches: Iterator[Any],
    source: Source,
    columns: Sequence[str],
    names: Sequence[Names],
    how: Reading,
    row_bytes: float,
) -> Iterator[Row]:
    row = 0
    for batch in batches:
        values = [
            by_name(column_values(batch.column(column), f"{source.path}", row + 1, how), of)
            for column, of in zip(columns, names, strict=True)
        ]
        for cells in zip(*values, strict=True):
            row += 1
            yield Row(row, cells)
        how.on_read(round(row_bytes * batch.num_rows))


def column_values(column: Any, where: str, row: int, how: Reading) -> list[Any]:
    """A column of a table as Python values, texts and lists of them checked; `row` is that of the first, from 1."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    # Arrow does not check that strings are UTF-8, and converting a bad one raises without saying where
    if _is_text(column.type):
        cells = column.cast(pa.large_binary()).to_pylist()
        return [_text(cell, where, at, how) for at, cell in enumerate(cells, row)]
    if _is_list(column.type) and _is_text(column.type.value_type):
        lists = column.cast(pa.large_list(pa.large_binary())).to_pylist()
        return [cells and [_text(cell, where, at, how) for cell in cells] for at, cells in enumerate(lists, row)]
    return column.to_pylist()


def _is_text(kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _text(cell: bytes | None, where: str, row: int, how: Reading) -> str | None:
    return None if cell is None else decode(cell, where, row, repair=how.repair, counts=how.counts)


def text_of(row: Row, source: Source, column: str) -> str:
    """The first value of a row as a text; a null is an empty one. Raises DataError for anything else."""
    value = row.values[0]
    if value is None:
        return ""
    if not isinstance(value, str):
        where = f"{source.path}:{row.line}"
        raise DataError(f"{where}: {column} is {value!r:.60}, not a text. Name the column that holds text")
    return value


_READERS: dict[str, Callable[[Source, Sequence[str], Reading], Iterator[Row]]] = {
    ".txt": _text_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
