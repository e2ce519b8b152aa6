"""Rows written again with columns added: every row as it was and in its place; the file is whole, or not there."""

import csv
import gzip
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, cast

import orjson
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.errors import EnvironmentProblem, UsageError
from pipeline.pieces import FAMILIES, Piece
from pipeline.publish import SCRATCH_PREFIX, fsync
from pipeline.readers import delimiter
from pipeline.sources import Source, kind_of
from pipeline.tables import lists_of_texts

Added = Mapping[str, Sequence[Any]]
"""New columns by name, a value a row of the piece."""
Write = Callable[[Piece, Added], None]


def check_target(source: Source, target: Path) -> None:
    """Raises UsageError for a file that rows of the source cannot be written to."""
    kind, compression = kind_of(target) or ("", "")
    if FAMILIES.get(kind) != FAMILIES[source.kind]:
        alike = [name for name, family in FAMILIES.items() if family == FAMILIES[source.kind]]
        raise UsageError(f"{target}: the output is of the kind of the input: name it {' or '.join(alike)}")
    if kind == ".parquet" and compression:
        raise UsageError(f"{target}: parquet is compressed already: leave out {compression}")
    if target.is_dir():
        raise UsageError(f"{target}: this is a folder. Name a file in it")


@contextmanager
def writing(target: Path) -> Iterator[Write]:
    """How pieces are written to a file, which is there once the block has ended without an error, and not before."""
    kind, compression = kind_of(target) or ("", "")
    families = {"JSON lines": _json_writer, "CSV": _csv_writer, "parquet": _parquet_writer}
    try:
        with _appearing(target) as scratch, families[FAMILIES[kind]](scratch, kind, compression) as write:
            yield write
    except OSError as error:
        raise EnvironmentProblem(f"{target}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A path beside the target that is renamed to it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for orphan in target.parent.glob(f"{SCRATCH_PREFIX}{target.name}-*"):
        if not psutil.pid_exists(int(orphan.name.rpartition("-")[2])):
            orphan.unlink(missing_ok=True)
    scratch = target.with_name(f"{SCRATCH_PREFIX}{target.name}-{os.getpid()}")
    try:
        yield scratch
        fsync(scratch)
        scratch.replace(target)
        fsync(target.parent)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def _compressed(path: Path, compression: str) -> Iterator[IO[bytes]]:
    with path.open("wb") as raw:
        if compression == ".gz":
            with gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0) as out:
                yield cast(IO[bytes], out)
        elif compression == ".zst":
            with zstandard.ZstdCompressor().stream_writer(raw, closefd=False) as out:
                yield cast(IO[bytes], out)
        else:
            yield raw


@contextmanager
def _json_writer(path: Path, kind: str, compression: str) -> Iterator[Write]:
    del kind
    with _compressed(path, compression) as out:

        def write(piece: Piece, added: Added) -> None:
            """New fields follow the old, of which not a byte is changed."""
            for number, line in enumerate(piece.rows):
                new = orjson.dumps({name: values[number] for name, values in added.items()})
                out.write(line.encode()[:-1].rstrip() + b"," + new[1:] + b"\n")

        yield write


@contextmanager
def _csv_writer(path: Path, kind: str, compression: str) -> Iterator[Write]:
    with _compressed(path, compression) as raw, TextIOWrapper(raw, encoding="utf-8", newline="") as out:
        plain, quoted = (
            csv.writer(out, delimiter=delimiter(kind), lineterminator="\n", quoting=quoting)
            for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
        )
        begun = False

        def put(row: Sequence[Any]) -> None:
            unusual = any("\r" in str(value) for value in row)  # a line end for readers, which csv.writer leaves bare
            (quoted if unusual else plain).writerow(row)

        def write(piece: Piece, added: Added) -> None:
            nonlocal begun
            if not begun:
                put([*piece.header, *added])
            begun = True
            for row, new in zip(piece.rows, zip(*added.values(), strict=True), strict=True):
                put([*row, *new])

        yield write


@contextmanager
def _parquet_writer(path: Path, kind: str, compression: str) -> Iterator[Write]:
    del kind, compression
    opened: list[pq.ParquetWriter] = []

    def write(piece: Piece, added: Added) -> None:
        table = piece.rows
        for name, values in added.items():
            lists = any(isinstance(value, list) for value in values[:1])
            table = table.append_column(name, lists_of_texts(values) if lists else pa.array(values))
        if not opened:
            opened.append(pq.ParquetWriter(path, table.schema, compression="zstd"))
        opened[0].write_table(table)

    try:
        yield write
    finally:
        for writer in opened:
            writer.close()
