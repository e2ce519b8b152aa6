"""Text in parquet, written so that equal texts give equal bytes, and read one row group at a time."""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3

from pipeline.faults import fault_point

GROUP_BYTES = 4 << 20
PART_BYTES = 64 << 20
LEVEL = 1
"""Of zstandard, for a corpus: half the time of level 3 for a seventh more bytes."""
_TEXT = pa.schema([("text", pa.string())])
_LISTS = pa.list_(pa.string())


def lists_of_texts(values: Sequence[Sequence[str]]) -> pa.Array:
    """A column of lists, also where there are no rows, or nothing is in any."""
    return pa.array(values, _LISTS)


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """A whole table at once."""
    pq.write_table(pa.table(dict(columns)), path, **_options(3))


def _options(level: int) -> dict[str, Any]:
    return {"compression": "zstd", "compression_level": level, "use_dictionary": False, "write_statistics": False}


class TextWriter:
    """Writes texts into `part-00000.parquet`, `part-00001.parquet` ... of about 64 MiB of text, in groups of 4 MiB.

    `name` stands in place of "part" where several write into one folder.

    Holds two groups in memory: one is compressed and written while the next is gathered. Use it in a `with` block; the
    last part is finished at its end.
    """

    def __init__(self, folder: Path, name: str = "part") -> None:
        self.n_documents = self.n_bytes = self.n_parts = 0
        self._folder, self._name = folder, name
        self._group: list[str] = []
        self._group_bytes = self._part_bytes = 0
        self._part: pq.ParquetWriter | None = None
        self._thread = ThreadPoolExecutor(1, "parquet")
        self._writing: Future[None] | None = None

    def add(self, texts: Iterable[str]) -> None:
        for text in texts:
            self._group.append(text)
            self._group_bytes += len(text) if text.isascii() else len(text.encode())
            if self._group_bytes >= GROUP_BYTES:
                self._flush()

    def _flush(self) -> None:
        if self._part is None:
            path = self._folder / f"{self._name}-{self.n_parts:05d}.parquet"
            self._part = pq.ParquetWriter(path, _TEXT, **_options(LEVEL))
            self.n_parts += 1
        fault_point("corpus.group")
        batch = pa.record_batch([pa.array(self._group, pa.string())], schema=_TEXT)
        self._wait()
        self._writing = self._thread.submit(self._part.write_batch, batch)
        self.n_documents += len(self._group)
        self.n_bytes += self._group_bytes
        self._part_bytes += self._group_bytes
        self._group, self._group_bytes = [], 0
        if self._part_bytes >= PART_BYTES:
            self._finish_part()

    def _wait(self) -> None:
        """Until the group before is written; what went wrong there is raised here."""
        if (writing := self._writing) is not None:
            self._writing = None
            writing.result()

    def _finish_part(self) -> None:
        self._wait()
        if self._part is not None:
            self._part.close()
        self._part, self._part_bytes = None, 0

    def __enter__(self) -> "TextWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._group and error is None:
                self._flush()
            self._finish_part()
        finally:
            self._thread.shutdown()


def read_group(path: Path, group: int) -> list[str]:
    """The texts of one row group of a part."""
    with pq.ParquetFile(path, memory_map=True) as file:
        return file.read_row_group(group).column("text").to_pylist()


def n_groups(path: Path) -> int:
    """How many row groups a part has."""
    return pq.read_metadata(path).num_row_groups


def read_documents(parts: Sequence[Path]) -> Iterator[str]:
    """The texts of some parts in order, one row group in memory at a time."""
    for part in parts:
        for group in range(n_groups(part)):
            yield from read_group(part, group)


class Seen:
    """Which texts were seen before, by their 128-bit digest, in a file, so that memory does not grow with them."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._digests = sqlite3.connect(path, isolation_level=None)
        self._digests.execute("PRAGMA journal_mode = OFF")
        self._digests.execute("PRAGMA synchronous = OFF")
        self._digests.execute("PRAGMA cache_size = -65536")
        self._digests.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._digests.execute("BEGIN")

    def add(self, text: str) -> bool:
        """Whether the text is new; from now on it is not."""
        digest = blake3(text.encode()).digest(length=16)
        return self._digests.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1

    def close(self) -> None:
        self._digests.close()
