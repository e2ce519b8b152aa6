"""A flat sequence of tokens over several memory-mapped files, that knows where its documents start."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

Ints = Int64[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class TokenStream:
    """The tokens of one split. Small to pickle: files are mapped by whoever reads them."""

    path: Path
    name: str
    dtype: str
    shards: tuple[tuple[str, int], ...]
    """File name and number of tokens of each shard."""
    n_documents: int
    n_bytes: int
    """The UTF-8 bytes of the texts that these tokens stand for, special tokens not counted."""

    @cached_property
    def n_tokens(self) -> int:
        return sum(tokens for _, tokens in self.shards)

    @cached_property
    def document_starts(self) -> Ints:
        """Where each document starts, int64 [n_documents], memory-mapped."""
        return np.asarray(np.load(self.path / f"{self.name}.documents.npy", mmap_mode="r"))[:-1]

    def rows(self, starts: Ints, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows of the stream: tokens, and the number of each token's document, both int64 [n, length].

        Raises IndexError for one that reaches out of the stream.
        """
        tokens = np.empty((len(starts), length), dtype=np.int64)
        begins = np.zeros((len(starts), length), dtype=np.int64)
        first = np.searchsorted(self.document_starts, starts, side="right") - 1
        last = np.searchsorted(self.document_starts, starts + length, side="left")
        for row, start in enumerate(starts.tolist()):
            self._read_into(tokens[row], start)
            begins[row, self.document_starts[first[row] + 1 : last[row]] - start] = 1
        return tokens, np.cumsum(begins, axis=1) + first[:, None]

    def _read_into(self, out: np.ndarray, start: int) -> None:
        if start < 0 or start + len(out) > self.n_tokens:
            raise IndexError(f"tokens {start}..{start + len(out)} of a stream that has {self.n_tokens}")
        done = 0
        shard = int(np.searchsorted(self._bounds, start, side="right")) - 1
        while done < len(out):
            begin = start + done - int(self._bounds[shard])
            piece = self._maps[shard][begin : begin + len(out) - done]
            out[done : done + len(piece)] = piece
            done, shard = done + len(piece), shard + 1

    @cached_property
    def _bounds(self) -> Ints:
        return np.cumsum([0, *(tokens for _, tokens in self.shards)], dtype=np.int64)

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        mapped = (np.memmap(self.path / file, dtype=self.dtype, mode="r", shape=(n,)) for file, n in self.shards)
        return [np.asarray(tokens) for tokens in mapped]  # slicing a memmap itself is ten times slower

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.path, self.name, self.dtype, self.shards, self.n_documents, self.n_bytes)
        return _token_stream, fields


def _token_stream(
    path: Path, name: str, dtype: str, shards: tuple[tuple[str, int], ...], n_documents: int, n_bytes: int
) -> TokenStream:
    return TokenStream(path=path, name=name, dtype=dtype, shards=shards, n_documents=n_documents, n_bytes=n_bytes)
