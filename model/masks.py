"""Which keys a query may see: one small predicate per rule, joined by "and"."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int, Int32
from torch import Tensor

from model import documents

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key) indices -> whether that query sees that key, as FlexAttention's mask_mod."""


def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def window(size: int) -> MaskMod:
    """Keys less than `size` positions away, on either side."""
    return lambda batch, head, query, key: (query - key).abs() < size


def same_run(ids: documents.Ids) -> MaskMod:
    """Keys of the query's own document. Padding sees the padding beside it, so that no softmax is over nothing."""
    run = documents.runs(ids)
    return lambda batch, head, query, key: run[batch, query] == run[batch, key]


@dataclass(frozen=True, eq=False, kw_only=True)
class Pattern:
    """The attention pattern of one forward pass, made once and shared by all layers; what a kernel needs is cached.

    The queries are the last `n_queries` of the `n_keys` positions: fewer when earlier keys come from a cache.
    """

    batch: int
    n_queries: int
    n_keys: int
    device: torch.device
    causal: bool = True
    sliding_window: int | None = None
    document_ids: Int[Tensor, "batch n_keys"] | None = None

    @property
    def offset(self) -> int:
        """The position of the first query among the keys."""
        return self.n_keys - self.n_queries

    @property
    def mask_mods(self) -> list[MaskMod]:
        """The rules in force."""
        mods: list[MaskMod] = [causal] if self.causal else []
        if self._windowed:
            assert self.sliding_window is not None
            mods.append(window(self.sliding_window))
        if self.document_ids is not None:
            mods.append(same_run(self.document_ids))
        return mods

    @cached_property
    def allowed(self) -> Bool[Tensor, "#batch 1 n_queries n_keys"]:
        """True where a query sees a key. Quadratic in the sequence: for kernels that can do no better."""
        batch, query, key = (torch.arange(n, device=self.device) for n in (self.batch, self.n_queries, self.n_keys))
        index = batch.view(-1, 1, 1, 1), batch[:1], query.view(-1, 1) + self.offset, key
        seen = torch.ones(1, 1, self.n_queries, self.n_keys, dtype=torch.bool, device=self.device)
        for mod in self.mask_mods:
            seen = seen & mod(*index)
        return seen

    @cached_property
    def forbidden(self) -> Bool[Tensor, "#batch 1 n_queries n_keys"]:
        """True where a query does not see a key."""
        return ~self.allowed

    @property
    def dense(self) -> Bool[Tensor, "#batch 1 n_queries n_keys"] | None:
        """`allowed`, or None where `is_causal` says it all."""
        return None if self._plain else self.allowed

    @property
    def is_causal(self) -> bool:
        """Whether the whole pattern is the square causal triangle."""
        return self.causal and self._plain and self.n_queries > 1

    @cached_property
    def cu_seqlens(self) -> tuple[Int32[Tensor, " runs_plus_one"], Int32[Tensor, " runs_plus_one"]]:
        """Where each run begins among all queries and among all keys, rows laid end to end, and the two totals.

        How many runs there are depends on the ids, so with document ids this waits for the device, once a forward.
        """
        if self.document_ids is None:
            first_key = torch.arange(self.batch, device=self.device) * self.n_keys
        else:
            first_key = documents.starts(self.document_ids).flatten().nonzero().squeeze(1)
        row, column = first_key // self.n_keys, first_key % self.n_keys
        first_query = row * self.n_queries + (column - self.offset).clamp(min=0)
        return _closed(first_query, self.batch * self.n_queries), _closed(first_key, self.batch * self.n_keys)

    @cached_property
    def max_seqlen(self) -> tuple[int, int]:
        """The most queries and the most keys that any run has."""
        if self.document_ids is None:
            return self.n_queries, self.n_keys
        queries, keys = (int(bounds.diff().max()) for bounds in self.cu_seqlens)
        return queries, keys

    @property
    def _windowed(self) -> bool:
        return self.sliding_window is not None and self.sliding_window < self.n_keys

    @property
    def _plain(self) -> bool:
        """The last query alone sees every key, causal or not; a longer tail of queries needs its triangle drawn."""
        aligned = not self.causal or self.n_queries in (1, self.n_keys)
        return aligned and not self._windowed and self.document_ids is None


def _closed(first: Tensor, total: int) -> Tensor:
    return torch.nn.functional.pad(first, (0, 1), value=total).to(torch.int32)
