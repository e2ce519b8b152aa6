"""The texts of a source, many at a time. A block of lines is parsed at once; what is odd about one, its rows say."""

import io
from collections.abc import Iterator
from typing import IO

import orjson

from pipeline import readers
from pipeline.readers import BOM, Reading, Row, json_rows, plain_rows, read_rows, text_of
from pipeline.sources import Source
from pipeline.streams import open_bytes
from pipeline.text import batches

BLOCK_BYTES = 1 << 20


class OddBlock(Exception):
    """Some line of a block is not as most are."""


def read_texts(source: Source, column: str, how: Reading) -> Iterator[list[str]]:
    """What `read_rows` and `text_of` give, in lists of about a MiB; raises what they raise."""
    if source.kind in (".jsonl", ".ndjson"):
        return _of_json(source, column, how)
    if source.kind == ".txt" and not how.whole_files:
        return _of_plain_lines(source, column, how)
    return batches(_texts(read_rows(source, [column], how), source, column), BLOCK_BYTES)


def _texts(rows: Iterator[Row], source: Source, column: str) -> Iterator[str]:
    return (text_of(row, source, column) for row in rows)


def _of_json(source: Source, column: str, how: Reading) -> Iterator[list[str]]:
    with open_bytes(source, how.on_read) as stream:
        for first, lines in _blocks(stream, readers.MAX_LINE_BYTES):
            try:
                texts = _json_block(lines, column)
            except OddBlock:
                rows = json_rows(io.BytesIO(b"".join(lines)), source, [column], how, first)
                texts = list(_texts(rows, source, column))
            yield texts


def _of_plain_lines(source: Source, column: str, how: Reading) -> Iterator[list[str]]:
    with open_bytes(source, how.on_read) as stream:
        for first, lines in _blocks(stream, readers.MAX_PIECE_BYTES):
            rest = lines.pop() if _goes_on(lines[-1]) else b""
            try:
                texts = _plain_block(lines, at_start=first == 1 and source.is_from_start)
            except OddBlock:
                rows = plain_rows(io.BytesIO(b"".join(lines)), source, how, first)
                texts = list(_texts(rows, source, column))
            yield texts
            if rest:  # a line that comes in pieces; so may those after it
                rows = plain_rows(stream, source, how, first + len(lines), rest)
                yield from batches(_texts(rows, source, column), BLOCK_BYTES)


def _blocks(stream: IO[bytes], longest: int) -> Iterator[tuple[int, list[bytes]]]:
    """Lines of about a MiB together, and the number of the first, from 1. One that is too long comes cut, at an end."""
    first, lines, size = 1, [], 0
    while line := stream.readline(longest):
        lines.append(line)
        size += len(line)
        if size >= min(BLOCK_BYTES, longest - len(BOM)):
            yield first, lines
            first, lines, size = first + len(lines), [], 0
    if lines:
        yield first, lines


def _json_block(lines: list[bytes], column: str) -> list[str]:
    try:
        texts = [record[column] for record in map(orjson.loads, lines)]
        "".join(texts)  # raises TypeError unless all are texts
    except (ValueError, KeyError, TypeError) as error:  # no JSON or no UTF-8; no such column; no object or no text
        raise OddBlock from error
    return texts


def _goes_on(line: bytes) -> bool:
    """Whether a line may be too long for one row."""
    return len(line) >= readers.MAX_PIECE_BYTES - len(BOM) and not line.endswith(b"\n")


def _plain_block(lines: list[bytes], *, at_start: bool) -> list[str]:
    try:
        text = b"".join(lines).removeprefix(BOM if at_start else b"").decode()
    except UnicodeDecodeError as error:
        raise OddBlock from error
    if "\0" in text:
        raise OddBlock
    texts = text.split("\n")
    if not texts[-1]:  # after the end of the last line
        texts.pop()
    return [text.rstrip("\r") for text in texts] if "\r" in text else texts
