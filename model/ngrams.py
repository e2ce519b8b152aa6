"""What the n-grams of a text say of its label by themselves: a linear model, blended with what the network says.

A wide part beside a deep one (Cheng et al. 2016, arXiv:1606.07792) over hashed n-grams (Joulin et al. 2017,
arXiv:1607.01759). The n-grams are of tokens, so that it reads what the network reads and nothing else.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn
from torch.nn.functional import embedding, pad

from model import documents
from model.blend import Blend

Tokens = Int64[Tensor, "batch seq"]
Places = Int[Tensor, "#batch seq"]
Real = Bool[Tensor, "batch seq"]
Rows = Int64[Tensor, " n"]

PRIME, FACTOR = 2**31 - 1, 1_000_003
"""A number below the one times the other fits int64 with room to spare: every program computes the same hash."""
NONE = -1
"""In place of a row of the table where no n-gram ends."""


class NGrams(nn.Module):
    """A table with a row for each hash of an n-gram, n up to `order`: float32 [buckets, n_labels].

    An n-gram that a text has c times counts 1 + ln(c), the sublinear term frequency of text retrieval. A text's logits
    are the sum of its n-grams' rows, so weighed, over the root of the sum of these weights: a long text says more than
    a short one, but not in proportion.
    """

    def __init__(self, n_labels: int, order: int, buckets: int) -> None:
        super().__init__()
        if order < 1 or buckets < 1:
            raise ValueError(f"order={order} and buckets={buckets} must be at least 1")
        self.order = order
        self.table = nn.Parameter(torch.zeros(buckets, n_labels))
        self.blend = Blend()

    def forward(self, tokens: Tokens, ids: documents.Ids | None = None) -> Float[Tensor, "n_documents n_labels"]:
        """The logits of every document, as `Classifier.forward` has them."""
        if ids is None:
            return self.of_rows(tokens, torch.ones_like(tokens))
        row, weight, held = self.read(tokens, ids)
        sums = torch.segment_reduce(embedding(row, self.table) * weight[:, None], "sum", lengths=held)
        return sums / torch.segment_reduce(weight, "sum", lengths=held).sqrt()[:, None]

    def read(self, tokens: Tokens, ids: documents.Ids) -> tuple[Rows, Float[Tensor, " n"], Int64[Tensor, " documents"]]:
        """The table's row of each n-gram that a document has, and its weight; and how many of them each document has.

        The documents are in row-major order of appearance.
        """
        run = documents.starts(ids).flatten().cumsum(0).view_as(ids)
        n_codes, buckets = self.order + 1, len(self.table)
        found = [
            ((run * n_codes + n) * buckets + row)[there]
            for n, (row, there) in enumerate(self._hashes(tokens, documents.positions(ids), ids != documents.PADDING))
        ]
        code, count = torch.cat(found).unique(return_counts=True)
        held = (code // (n_codes * buckets)).unique_consecutive(return_counts=True)[1]
        return code % buckets, 1 + count.to(self.table.dtype).log(), held

    def of_rows(self, tokens: Tokens, mask: Int64[Tensor, "batch seq"]) -> Float[Tensor, "batch n_labels"]:
        """The logits of rows of one document each, in operators that exporters know; the mask is 0 on padding."""
        places = torch.arange(tokens.shape[1], device=tokens.device)[None]
        found = [row.where(there, NONE).sort(dim=1).values for row, there in self._hashes(tokens, places, mask != 0)]
        weight = torch.cat([_shares(row) for row in found], dim=1)
        rows = embedding(torch.cat(found, dim=1).clamp(min=0), self.table)
        return (rows * weight[:, :, None]).sum(dim=1) / weight.sum(dim=1, keepdim=True).sqrt()

    def _hashes(self, tokens: Tokens, places: Places, real: Real) -> Iterator[tuple[Tokens, Real]]:
        """For each n, the table's row of the n-gram that ends at each token, and whether that is all in one document.

        `places` count from a document's first token; what is not `real` is padding.
        """
        seq = tokens.shape[1]
        for n in range(1, self.order + 1):
            code = torch.full_like(tokens, n)
            for back in reversed(range(n)):
                code = (code * FACTOR + pad(tokens, (back, 0))[:, :seq] + 1) % PRIME
            yield code % len(self.table), real & (places >= n - 1)


def _shares(row: Tokens) -> Float[Tensor, "batch seq"]:
    """The weight of each n-gram, in sorted rows, shared out evenly over the places where it stands; 0 for NONE."""
    nth = (row != pad(row, (1, 0), value=NONE - 1)[:, :-1]).cumsum(dim=1) - 1
    count = torch.zeros_like(row).scatter_add(1, nth, torch.ones_like(row)).gather(1, nth).float()
    return (row != NONE) * (1 + count.log()) / count
