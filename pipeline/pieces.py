"""The rows of a file in pieces, each with its text and all that stands beside it, in bounded memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.readers import (
    Reading,
    Row,
    check_columns,
    column_values,
    csv_records,
    json_record,
    seekable,
    text_of,
)
from pipeline.readers import lines as lines_of
from pipeline.sources import Source, find
from pipeline.streams import open_bytes, readable

PIECE_ROWS, PIECE_BYTES = 4096, 32 << 20
"""Rows come in pieces of at most about this much; characters count as bytes."""
BATCH_ROWS = 512

FAMILIES = {".jsonl": "JSON lines", ".ndjson": "JSON lines", ".csv": "CSV", ".tsv": "CSV", ".parquet": "parquet"}
"""Kinds of files with columns. An output is of the family of its input."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive rows: their texts, and the rows as the writer of their family takes them."""

    texts: list[str]
    rows: Any
    header: tuple[str, ...] = ()


def source_of(path: str) -> Source:
    """The one file with columns that a path names. Raises DataError."""
    found = find(path)
    if len(found) != 1 or found[0].kind not in FAMILIES:
        what = f"{len(found)} files" if len(found) != 1 else f"a {found[0].kind.removeprefix('.')}"
        raise DataError(
            f"{path}: {what}. Give one file of {', '.join(FAMILIES)}, also with .gz or .zst; lines of plain text are "
            "read from standard input, where - stands in place of texts"
        )
    return found[0]


def read_pieces(source: Source, column: str, added: Sequence[str], how: Reading) -> Iterator[Piece]:
    """All rows of a file. Raises DataError, with file and line, for a bad row or where a name in `added` is taken."""
    families = {"JSON lines": _json_pieces, "CSV": _csv_pieces, "parquet": _parquet_pieces}
    yield from families[FAMILIES[source.kind]](source, column, added, how)


def _json_pieces(source: Source, column: str, added: Sequence[str], how: Reading) -> Iterator[Piece]:
    with open_bytes(source, how.on_read) as stream:
        yield from _gathered(_json_rows(lines_of(stream, source, how), source, column, added))


def _json_rows(
    numbered: Iterator[tuple[int, str]], source: Source, column: str, added: Sequence[str]
) -> Iterator[tuple[str, str]]:
    for line, text in numbered:
        if text.strip():
            where = f"{source.path}:{line}"
            record = json_record(text, where)
            check_columns(where, list(record), [column])
            _check_free(where, list(record), added)
            yield text_of(Row(line, (record[column],)), source, column), text.strip()


def _csv_pieces(source: Source, column: str, added: Sequence[str], how: Reading) -> Iterator[Piece]:
    with open_bytes(source, how.on_read) as stream:
        records = csv_records((text for _, text in lines_of(stream, source, how)), source)
        line, header = next(records, (1, []))
        if header:
            check_columns(f"{source.path}:{line}", header, [column])
            _check_free(f"{source.path}:{line}", header, added)
            place = header.index(column)
            yield from _gathered(((record[place], record) for _, record in records), tuple(header))


def _gathered(rows: Iterator[tuple[str, Any]], header: tuple[str, ...] = ()) -> Iterator[Piece]:
    texts: list[str] = []
    kept: list[Any] = []
    size = 0
    for text, row in rows:
        texts.append(text)
        kept.append(row)
        size += len(row) if isinstance(row, str) else sum(map(len, row))
        if len(texts) == PIECE_ROWS or size >= PIECE_BYTES:
            yield Piece(texts, kept, header)
            texts, kept, size = [], [], 0
    if texts:
        yield Piece(texts, kept, header)


def _parquet_pieces(source: Source, column: str, added: Sequence[str], how: Reading) -> Iterator[Piece]:
    with readable(source.path), seekable(source) as place, pq.ParquetFile(place, pre_buffer=False) as file:
        check_columns(str(source.path), file.schema_arrow.names, [column])
        _check_free(str(source.path), file.schema_arrow.names, added)
        row_bytes, row = source.n_bytes / max(1, file.metadata.num_rows), 1
        for table in _tables(file.iter_batches(batch_size=BATCH_ROWS)):
            values = column_values(table.column(column), str(source.path), row, how)
            rows = [Row(number, (value,)) for number, value in enumerate(values, row)]
            yield Piece([text_of(r, source, column) for r in rows], table)
            row += table.num_rows
            how.on_read(round(row_bytes * table.num_rows))


def _tables(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    kept: list[pa.RecordBatch] = []
    for batch in batches:
        kept.append(batch)
        if sum(b.num_rows for b in kept) >= PIECE_ROWS or sum(b.nbytes for b in kept) >= PIECE_BYTES:
            yield pa.Table.from_batches(kept)
            kept = []
    if kept:
        yield pa.Table.from_batches(kept)


def _check_free(where: str, present: Sequence[str], added: Sequence[str]) -> None:
    for name in added:
        if name in present:
            raise DataError(f"{where}: there is a column {name!r} already. Give --prefix, such as --prefix predicted_")
