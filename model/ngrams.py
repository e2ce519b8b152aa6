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

PRIME, FACTOR = 2**31 - 1, 1_000_003
"""A number below the one times the other fits int64 with room to spare: every program computes the same hash."""


class NGrams(nn.Module):
    """A table with a row for each hash of an n-gram, n up to `order`: float32 [buckets, n_labels].

    A text's logits are the sum of its n-grams' rows over the root of their number: a long text says more than a short
    one, but not in proportion.
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
        real, lengths = ids != documents.PADDING, documents.lengths(ids)
        sums, counts = self._ending_at_each_token(tokens, documents.positions(ids), real)
        whole, number = (torch.segment_reduce(x[real], "sum", lengths=lengths) for x in (sums, counts))
        return whole / number.sqrt()

    def of_rows(self, tokens: Tokens, mask: Int64[Tensor, "batch seq"]) -> Float[Tensor, "batch n_labels"]:
        """The same for rows of one document each, in operators that exporters know; the mask is 0 on padding."""
        places = torch.arange(tokens.shape[1], device=tokens.device)[None]
        sums, counts = self._ending_at_each_token(tokens, places, mask != 0)
        return sums.sum(dim=1) / counts.sum(dim=1).sqrt()

    def hashes(self, tokens: Tokens, places: Places, real: Real) -> Iterator[tuple[Tokens, Real]]:
        """For each n, the table's row of the n-gram that ends at each token, and whether that is all in one document.

        `places` count from a document's first token; what is not `real` is padding.
        """
        seq = tokens.shape[1]
        for n in range(1, self.order + 1):
            code = torch.full_like(tokens, n)
            for back in reversed(range(n)):
                code = (code * FACTOR + pad(tokens, (back, 0))[:, :seq] + 1) % PRIME
            yield code % len(self.table), real & (places >= n - 1)

    def _ending_at_each_token(
        self, tokens: Tokens, places: Places, real: Real
    ) -> tuple[Float[Tensor, "batch seq n_labels"], Float[Tensor, "batch seq 1"]]:
        """The sum of the rows of the n-grams that end there, and how many these are."""
        found = [
            (embedding(row, self.table) * there[:, :, None], there[:, :, None].to(self.table.dtype))
            for row, there in self.hashes(tokens, places, real)
        ]
        sums, counts = (torch.stack(parts).sum(dim=0) for parts in zip(*found, strict=True))
        return sums, counts
