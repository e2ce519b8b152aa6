"""Bytes out of a file, plain, gzip or zstandard, in bounded memory; whatever is wrong with the file is a DataError."""

import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa
import zstandard

from pipeline.errors import DataError
from pipeline.sources import Source

BUFFER_BYTES = 1 << 20
ZSTD_CHUNK_BYTES = 1 << 12
"""Four bytes of a hostile file can stand for 128 KiB of output; so little at a time keeps that under 128 MiB."""


class _Metered(io.FileIO):
    """A file, or a span of its bytes, that tells how many were read of it."""

    def __init__(self, source: Source, on_read: Callable[[int], None]) -> None:
        super().__init__(source.path)
        start, stop = source.span or (0, sys.maxsize)
        self.seek(start)
        self._left = stop - start
        self._on_read = on_read

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        count = super().readinto(buffer[: self._left]) or 0
        self._left -= count
        self._on_read(count)
        return count


class _Zstd(io.RawIOBase):
    """The content of a zstandard file of any number of frames. Unlike zstandard's own reader, refuses a torn one."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        while not self._ready:
            chunk = self._next_chunk()
            if not chunk:
                return 0
            self._ready = memoryview(self._frame.decompress(chunk))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _next_chunk(self) -> bytes:
        if not self._frame.eof:
            chunk = self._raw.read(ZSTD_CHUNK_BYTES)
            if not chunk:
                raise EOFError("the compressed data ends too early")
            return chunk
        chunk = self._frame.unused_data or self._raw.read(ZSTD_CHUNK_BYTES)
        if chunk:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        return chunk


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what a library raises about a bad file into a DataError with its path."""
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be read: {reason}. It may be damaged or truncated: give it anew") from error


@contextmanager
def open_bytes(source: Source, on_read: Callable[[int], None]) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file, or those of its span.

    `on_read` gets the number of bytes read from disk, as reading goes on.
    """
    with readable(source.path), io.BufferedReader(_Metered(source, on_read), BUFFER_BYTES) as raw:
        if source.compression and not source.path.stat().st_size:
            raise EOFError("it has 0 bytes")
        yield _decompressed(raw, source.compression)  # pyright: ignore[reportArgumentType]  # a reader of a raw file


def _decompressed(raw: io.BufferedReader, compression: str) -> IO[bytes]:
    if compression == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), BUFFER_BYTES)  # type: ignore[arg-type]
    return io.BufferedReader(_Zstd(raw), BUFFER_BYTES) if compression == ".zst" else raw
