"""The sources of a corpus in chunks that can be read side by side. Their bytes alone decide where one ends."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from pipeline.sources import Source
from pipeline.streams import readable

CHUNKS_AIMED_AT = 64
SMALLEST_BYTES, LARGEST_BYTES = 8 << 20, 64 << 20
OF_LINES = (".txt", ".jsonl", ".ndjson")
"""Kinds that can be read from the start of any line on, where they are not compressed."""

Chunk = tuple[Source, ...]
"""Sources, or spans of lines of them, in the order they are read."""


def chunks(found: Sequence[Source], *, by_line: bool) -> list[Chunk]:
    """About 64 chunks of 8 to 64 MiB each, as far as there are so many bytes, and files can be cut.

    `by_line`: whether a document is a line, so that a file of lines can be cut. Raises DataError where one cannot be
    read.
    """
    total = sum(source.n_bytes for source in found)
    aim = min(LARGEST_BYTES, max(SMALLEST_BYTES, total // CHUNKS_AIMED_AT))
    gathered: list[list[Source]] = []
    size = aim
    for piece in (piece for source in found for piece in _cut(source, aim, by_line)):
        if size >= aim:
            gathered.append([])
            size = 0
        gathered[-1].append(piece)
        size += piece.n_bytes
    return [tuple(pieces) for pieces in gathered]


def _cut(source: Source, aim: int, by_line: bool) -> Iterator[Source]:
    """Spans of `aim` bytes or up to twice as many, or the source itself."""
    n_bytes = source.n_bytes
    n = n_bytes // aim
    if n < 2 or not by_line or source.kind not in OF_LINES or source.compression:
        yield source
        return
    starts = sorted({0, n_bytes, *(_next_line(source, n_bytes * i // n) for i in range(1, n))})
    yield from (replace(source, span=span) for span in pairwise(starts))


def _next_line(source: Source, at: int) -> int:
    """Where the first line starts that does not start before `at`."""
    with readable(source.path), source.path.open("rb") as file:
        file.seek(at - 1)
        while (piece := file.readline(1 << 20)) and not piece.endswith(b"\n"):
            pass  # a line may be longer than memory
        return file.tell()
