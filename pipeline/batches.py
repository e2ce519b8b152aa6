"""The data order: the batch of step n is a pure function of (seed, n), whoever asks, on however many workers.

There is no loader state to save. Step n takes samples n*k to n*k+k-1 of an endless sequence of epochs; epoch e visits
every sample once, in the order of a permutation keyed by (seed, e). Workers and micro batches only cut that list.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt64

from model.batch import IGNORE, Batch
from pipeline.errors import UsageError
from pipeline.targets import Targets
from pipeline.token_stream import TokenStream

Ints = Int64[np.ndarray, " n"]

FEISTEL_ROUNDS = 6
SHORTEST_ROW = 128
"""Tokens that a row of labelled documents has room for: enough for short ones to fill it well."""
HIDING = 1
"""Tells the draws that hide tokens from those of dropout."""


@dataclass(frozen=True, eq=False)
class StepBatch:
    """What one rank computes in one optimizer step. `targets` counts those of the whole step, all ranks together."""

    micro_batches: list[Batch]
    """As many on every rank: where weights are shared out, all ranks take part in each."""
    targets: int
    sample_ids: Ints
    own_ids: Ints
    """Those of `sample_ids` that are in this rank's micro batches."""


class Sampling(Protocol):
    """A source of step batches."""

    def step(self, step: int, *, rank: int = 0, world_size: int = 1) -> StepBatch: ...


def mix(value: UInt64[np.ndarray, " n"], key: int) -> UInt64[np.ndarray, " n"]:
    """A well-spread 64-bit hash of each value under a key (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = value + np.uint64((key * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def combine(*parts: int) -> int:
    """One 64-bit key out of several whole numbers, in order."""
    key = 0
    for part in parts:
        key = int(mix(np.array([part & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64), key)[0])
    return key


def permute(index: Ints, size: int, key: int) -> Ints:
    """Where each index below `size` goes in the permutation of 0..size-1 named by `key`, in memory free of `size`.

    A balanced Feistel network over the next even number of bits, walked until the value falls below `size` again
    (cycle walking: Black and Rogaway 2002).
    """
    half = np.uint64(max(1, (max(1, size - 1).bit_length() + 1) // 2))
    out = _feistel(index.astype(np.uint64), half, key)
    while (outside := out >= np.uint64(size)).any():
        out[outside] = _feistel(out[outside], half, key)
    return out.astype(np.int64)


def _feistel(value: UInt64[np.ndarray, " n"], half: np.uint64, key: int) -> UInt64[np.ndarray, " n"]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for round_ in range(FEISTEL_ROUNDS):
        left, right = right, left ^ (mix(right, combine(key, round_)) & mask)
    return (left << half) | right


def sample_ids(step: int, per_step: int, size: int, seed: int) -> Ints:
    """The samples of one step: int64 [per_step] below `size`. A step may reach over the end of an epoch."""
    position = np.arange(step * per_step, (step + 1) * per_step, dtype=np.int64)
    epochs, position = position // size, position % size
    ids = np.empty_like(position)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = permute(position[here], size, combine(seed, int(epoch)))
    return ids


def row_keys(seed: int, step: int, rows: int) -> Ints:
    """One random number a row of the step's global batch: no split into ranks or micro batches changes a mask."""
    return mix(np.arange(rows, dtype=np.uint64), combine(seed, step)).astype(np.int64)


Examples = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Of an objective: tokens and document ids [rows, seq + 1] and a key a row to inputs and targets [rows, seq]."""


@dataclass(frozen=True, kw_only=True)
class LanguageSampling:
    """Windows of a token stream as rows: row r reads tokens [r*seq_len, r*seq_len + seq_len]; documents never see each
    other, and no target crosses from one to the next. The tail shorter than a row is left out.

    Raises UsageError if the stream is shorter than one row.
    """

    stream: TokenStream
    seq_len: int
    rows_per_step: int
    micro_batch_size: int
    seed: int
    examples: Examples
    dropout: bool = False

    def __post_init__(self) -> None:
        if self.n_rows < 1:
            raise UsageError(
                f"the training split has {self.stream.n_tokens} tokens, fewer than one row of "
                f"model.seq_len={self.seq_len} + 1; give more text or a shorter row, or leave out what learns from it "
                "(for few labelled texts, adapt: null)"
            )

    @property
    def n_rows(self) -> int:
        return (self.stream.n_tokens - 1) // self.seq_len

    def step(self, step: int, *, rank: int = 0, world_size: int = 1) -> StepBatch:
        ids = sample_ids(step, self.rows_per_step, self.n_rows, self.seed)
        hiding = row_keys(combine(self.seed, HIDING), step, len(ids))
        whole = language_batch(self.stream, ids, self.seq_len, hiding, self.examples)
        count = int((whole.targets != IGNORE).sum())
        keys = torch.from_numpy(row_keys(self.seed, step, len(ids))) if self.dropout else None
        mine = slice(rank, None, world_size)
        parts = list(_split_rows(_cut_rows(replace(whole, dropout_keys=keys), mine), self.micro_batch_size))
        spare = idle((1, self.seq_len), (1, self.seq_len), self.dropout)
        parts = _as_many(parts, len(ids), world_size, self.micro_batch_size, spare)
        return StepBatch(parts, max(count, 1), ids, ids[mine])


def language_batch(stream: TokenStream, rows: Ints, seq_len: int, hiding: Ints, examples: Examples) -> Batch:
    """Some rows of a stream as an objective shows them; `hiding` holds a key a row for what it leaves to chance."""
    tokens, documents = (torch.from_numpy(part) for part in stream.rows(rows * seq_len, seq_len + 1))
    inputs, targets = examples(tokens.long(), documents, torch.from_numpy(hiding))
    ids = (documents - documents[:, :1])[:, :-1].int().contiguous()
    return Batch(inputs.contiguous(), targets.contiguous(), ids)


def language_batches(
    stream: TokenStream,
    seq_len: int,
    micro_batch_size: int,
    rows: int,
    examples: Examples,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """A rank's share of the first rows of a stream, always the same ones: what a validation loss is measured on."""
    starts = range(0, rows, micro_batch_size)
    for first in starts[rank::world_size]:
        ids = np.arange(first, min(rows, first + micro_batch_size), dtype=np.int64)
        yield language_batch(stream, ids, seq_len, mix(ids.astype(np.uint64), HIDING).astype(np.int64), examples)
    if rank >= len(starts) % world_size > 0:
        yield idle((1, seq_len), (1, seq_len), dropout=False)


def _batch(tokens: np.ndarray, targets: np.ndarray, documents: np.ndarray, keys: np.ndarray | None) -> Batch:
    return Batch(
        torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64)),
        torch.from_numpy(np.ascontiguousarray(targets, dtype=np.int64)),
        torch.from_numpy(np.ascontiguousarray(documents, dtype=np.int32)),
        None if keys is None else torch.from_numpy(np.ascontiguousarray(keys, dtype=np.int64)),
    )


def _as_many(batches: list[Batch], rows: int, world_size: int, size: int, spare: Batch) -> list[Batch]:
    """Fill up with `spare` to the number of micro batches that rank 0 has, who has the most."""
    most = math.ceil(math.ceil(rows / world_size) / size)
    return batches + [spare] * (most - len(batches))


def idle(tokens: tuple[int, ...], targets: tuple[int, ...], dropout: bool) -> Batch:
    """A batch of these shapes that counts for nothing: no target is to be learnt. For a rank that has no rows left."""
    zeros = np.zeros(tokens)
    return _batch(zeros, np.full(targets, IGNORE), zeros, np.zeros(tokens[0]) if dropout else None)


def _split_rows(batch: Batch, size: int) -> Iterator[Batch]:
    for first in range(0, len(batch.tokens), size):
        yield _cut_rows(batch, slice(first, first + size))


def _cut_rows(batch: Batch, part: slice) -> Batch:
    keys = None if batch.dropout_keys is None else batch.dropout_keys[part].contiguous()
    tokens, targets, ids = (x[part].contiguous() for x in (batch.tokens, batch.targets, batch.document_ids))
    return Batch(tokens, targets, ids, keys)


@dataclass(frozen=True, kw_only=True)
class LabelledSampling:
    """Labelled documents, packed whole into rows so that little is spent on padding.

    `documents` are token ids with their special tokens, each at most `seq_len` long. Rows have room for the longest
    document of their step and no more, or for many short ones: attention costs a row's square. `weights` say what the
    loss of each document counts, 1 in the mean; None is 1 for all.
    """

    documents: Sequence[np.ndarray]
    targets: Targets
    seq_len: int
    documents_per_step: int
    micro_batch_size: int
    seed: int
    dropout: bool = False
    weights: Float32[np.ndarray, " n"] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.documents) // self.documents_per_step)

    def step(self, step: int, *, rank: int = 0, world_size: int = 1) -> StepBatch:
        """One step; the last step of an epoch takes what is left, so that an epoch is exactly every document once."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.documents_per_step
        position = np.arange(first, min(len(self.documents), first + self.documents_per_step), dtype=np.int64)
        ids = permute(position, len(self.documents), combine(self.seed, epoch))
        lengths = [len(self.documents[i]) for i in ids]
        rows = pack(lengths, min(self.seq_len, max(SHORTEST_ROW, *lengths)))
        keys = row_keys(self.seed, step, len(rows)) if self.dropout else None
        mine = range(rank, len(rows), world_size)
        parts = [mine[i : i + self.micro_batch_size] for i in range(0, len(mine), self.micro_batch_size)]
        batches = [
            self._micro_batch([ids[rows[r]] for r in part], None if keys is None else keys[part]) for part in parts
        ]
        spare = idle((1, 1), (1, *self.targets.shape[1:]), self.dropout)
        batches = _as_many(batches, len(rows), world_size, self.micro_batch_size, spare)
        own = np.concatenate([ids[rows[r]] for r in mine]) if len(mine) else ids[:0]
        return StepBatch(batches, len(ids), ids, own)

    def _micro_batch(self, rows: list[Ints], keys: Ints | None) -> Batch:
        tokens, documents = fill_rows([[self.documents[i] for i in row] for row in rows])
        ids = np.concatenate(rows)
        batch = _batch(tokens, self.targets[ids], documents, keys)
        return batch if self.weights is None else replace(batch, weights=torch.from_numpy(self.weights[ids]))


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Spread items over rows that hold `capacity`, first fit, longest first; each row by ascending index."""
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        assert lengths[item] <= capacity, "documents are cut to the row length before they are packed"
        row = next((r for r, free in enumerate(room) if free >= lengths[item]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(item)
        room[row] -= lengths[item]
    return [sorted(row) for row in rows]


def fill_rows(rows: Sequence[Sequence[np.ndarray]], pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Documents one after the other in rows as long as the fullest: tokens int64, document ids int32 (-1 is pad)."""
    length = max(sum(len(document) for document in row) for row in rows)
    tokens = np.full((len(rows), length), pad_id, dtype=np.int64)
    documents = np.full((len(rows), length), -1, dtype=np.int32)
    for r, row in enumerate(rows):
        sizes = [len(document) for document in row]
        tokens[r, : sum(sizes)] = np.concatenate(row)
        documents[r, : sum(sizes)] = np.repeat(np.arange(len(row), dtype=np.int32), sizes)
    return tokens, documents
