"""Which keys a query may see: one small predicate per rule, joined by "and"."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import BFloat16, Bool, Int, Int32
from torch import Tensor
from torch.nn.functional import pad

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
    """The attention pattern of one forward pass, made once and shared by all layers; what a kernel needs is cached."""

    batch: int
    seq: int
    device: torch.device
    causal: bool = True
    sliding_window: int | None = None
    document_ids: Int[Tensor, "batch seq"] | None = None

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
    def allowed(self) -> Bool[Tensor, "#batch 1 seq seq"]:
        """True where a query sees a key. Quadratic in the sequence: for kernels that can do no better."""
        batch, place = (torch.arange(n, device=self.device) for n in (self.batch, self.seq))
        index = batch.view(-1, 1, 1, 1), batch[:1], place.view(-1, 1), place
        seen = torch.ones(1, 1, self.seq, self.seq, dtype=torch.bool, device=self.device)
        for mod in self.mask_mods:
            seen = seen & mod(*index)
        return seen

    @cached_property
    def bias(self) -> BFloat16[Tensor, "#batch 1 seq seq"]:
        """What to add to scores of any dtype before their softmax: 0 where a query sees a key, else -infinity.

        An addition is vectorised on a CPU, and filling by a mask is not: six times the time.
        """
        return torch.zeros_like(self.allowed, dtype=torch.bfloat16).masked_fill_(~self.allowed, float("-inf"))

    @cached_property
    def spans(self) -> Int32[Tensor, "#batch seq 2"]:
        """The first key that each query sees and the one after the last: whatever the rules, they are neighbours."""
        here = torch.arange(self.seq, device=self.device)[None]
        first, end = torch.zeros_like(here), torch.full_like(here, self.seq)
        if (ids := self.document_ids) is not None:
            first = here - documents.positions(ids)
            end = here + 1 + documents.positions(ids.flip(1)).flip(1)
        if self._windowed:
            assert self.sliding_window is not None
            first = first.maximum(here - self.sliding_window + 1)
            end = end.minimum(here + self.sliding_window)
        if self.causal:
            end = end.minimum(here + 1)
        return torch.stack([first, end], dim=-1).to(torch.int32)

    @property
    def dense(self) -> Bool[Tensor, "#batch 1 seq seq"] | None:
        """`allowed`, or None where `is_causal` says it all."""
        return None if self._plain else self.allowed

    @property
    def is_causal(self) -> bool:
        """Whether the whole pattern is the causal triangle."""
        return self.causal and self._plain

    @cached_property
    def cu_seqlens(self) -> Int32[Tensor, " runs_plus_one"]:
        """Where each run begins among all positions, rows laid end to end, and their number.

        How many runs there are depends on the ids, so with document ids this waits for the device, once a forward.
        """
        if self.document_ids is None:
            first = torch.arange(self.batch, device=self.device) * self.seq
        else:
            first = documents.starts(self.document_ids).flatten().nonzero().squeeze(1)
        return pad(first, (0, 1), value=self.batch * self.seq).to(torch.int32)

    @cached_property
    def max_seqlen(self) -> int:
        """The most positions that any run has."""
        return self.seq if self.document_ids is None else int(self.cu_seqlens.diff().max())

    @property
    def _windowed(self) -> bool:
        return self.sliding_window is not None and self.sliding_window < self.seq

    @property
    def _plain(self) -> bool:
        return not self._windowed and self.document_ids is None
