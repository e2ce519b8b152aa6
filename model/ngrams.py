"""What the n-grams of a text say of its label by themselves: a linear model, blended with what the network says.

A wide part beside a deep one (Cheng et al. 2016, arXiv:1606.07792) over hashed n-grams (Joulin et al. 2017,
arXiv:1607.01759), of tokens and of the bytes that these spell, so that it reads what the network reads.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int, Int16, Int64
from torch import Tensor, nn
from torch.nn.functional import embedding, pad

from model import documents
from model.blend import Blend

Symbols = Int64[Tensor, "batch seq"]
"""Tokens, or bytes."""
Places = Int[Tensor, "#batch seq"]
Mask = Int64[Tensor, "batch seq"]
Flat = Int64[Tensor, " n"]

PRIME, FACTOR = 2**31 - 1, 1_000_003
"""A number below the one times the other fits int64 with room to spare: every program computes the same hash."""
NONE = -1
"""In place of a row of the table where no n-gram ends, and of a byte where a token has no more."""
FEWEST_BYTES = 2


class Bag(nn.Module):
    """A table with a row for each hash of an n-gram of some kind of symbols: float32 [buckets, n_labels].

    An n-gram that a text has c times counts 1 + ln(c), the sublinear term frequency of text retrieval. A text's logits
    are the sum of its n-grams' rows, so weighed, over the root of the sum of these weights: a long text says more than
    a short one, but not in proportion.
    """

    def __init__(self, n_labels: int, lengths: range, buckets: int) -> None:
        super().__init__()
        if not lengths or lengths.start < 1 or buckets < 1:
            raise ValueError(f"{lengths} and buckets={buckets}: there must be n-grams to look up, and rows for them")
        self.lengths = lengths
        self.table = nn.Parameter(torch.zeros(buckets, n_labels))

    def forward(self, symbols: Flat, document: Flat, n_documents: int) -> Float[Tensor, "n_documents n_labels"]:
        """The logits of documents that lie one behind the other; `document` says for each symbol in which it is."""
        row, weight, held = self.count(symbols, document, n_documents)
        sums = torch.segment_reduce(embedding(row, self.table) * weight[:, None], "sum", lengths=held)
        return sums / torch.segment_reduce(weight, "sum", lengths=held).clamp(min=1).sqrt()[:, None]

    def count(
        self, symbols: Flat, document: Flat, n_documents: int
    ) -> tuple[Int64[Tensor, " counted"], Float[Tensor, " counted"], Int64[Tensor, " n_documents"]]:
        """The table's row of each n-gram that a document has, its weight, and how many of them each document has."""
        kinds, buckets = len(self.lengths), len(self.table)
        hashes = self._hashes(symbols[None], documents.positions(document[None]), torch.ones_like(symbols[None]).bool())
        found = [((document * kinds + n) * buckets + row[0])[there[0]] for n, (row, there) in enumerate(hashes)]
        code, count = torch.cat(found).unique(return_counts=True)
        held = torch.bincount(code // (kinds * buckets), minlength=n_documents)
        return code % buckets, 1 + count.to(self.table.dtype).log(), held

    def of_rows(self, symbols: Symbols, mask: Mask) -> Float[Tensor, "batch n_labels"]:
        """The logits of rows of one document each, in operators that exporters know; the mask is 0 on padding."""
        places = torch.arange(symbols.shape[1], device=symbols.device)[None]
        said = self.table.new_zeros(symbols.shape[0], self.table.shape[1])
        size = self.table.new_zeros(symbols.shape[0], 1)
        for row, there in self._hashes(symbols, places, mask != 0):
            found = row.where(there, NONE).sort(dim=1).values
            weight = _shares(found)
            said = said + (weight[:, None] @ embedding(found.clamp(min=0), self.table))[:, 0]
            size = size + weight.sum(dim=1, keepdim=True)
        return said / size.clamp(min=1).sqrt()

    def _hashes(
        self, symbols: Symbols, places: Places, real: Bool[Tensor, "batch seq"]
    ) -> Iterator[tuple[Symbols, Bool[Tensor, "batch seq"]]]:
        """For each n, the table's row of the n-gram that ends at each symbol, and whether that is all in one document.

        `places` count from a document's first symbol; what is not `real` is padding.
        """
        seq = symbols.shape[1]
        for n in self.lengths:
            code = torch.full_like(symbols, n)
            for back in reversed(range(n)):
                code = (code * FACTOR + pad(symbols, (back, 0))[:, :seq] + 1) % PRIME
            yield code % len(self.table), real & (places >= n - 1)


class NGrams(nn.Module):
    """N-grams of up to `order` tokens and, with `spelling`, of 2 to `n_bytes` bytes: the sum of what either says.

    `spelling` has the bytes of each token, int16 [vocabulary, most bytes of a token], and NONE behind them. Bytes know
    endings, names and languages by parts of words that no token is.
    """

    spelling: Int16[Tensor, "vocabulary longest"] | None

    def __init__(
        self,
        n_labels: int,
        order: int,
        buckets: int,
        spelling: Int16[Tensor, "vocabulary longest"] | None = None,
        n_bytes: int = 0,
    ) -> None:
        super().__init__()
        self.tokens = Bag(n_labels, range(1, order + 1), buckets)
        self.bytes = None if spelling is None else Bag(n_labels, range(FEWEST_BYTES, n_bytes + 1), buckets)
        self.register_buffer("spelling", spelling, persistent=False)
        self.blend = Blend()

    @property
    def shape(self) -> dict[str, int]:
        """What it was made with, but for the labels and the spelling."""
        n_bytes = 0 if self.bytes is None else self.bytes.lengths[-1]
        return {"order": self.tokens.lengths[-1], "buckets": len(self.tokens.table), "bytes": n_bytes}

    @property
    def bags(self) -> list[Bag]:
        return [self.tokens] if self.bytes is None else [self.tokens, self.bytes]

    def forward(self, tokens: Symbols, ids: documents.Ids | None = None) -> Float[Tensor, "n_documents n_labels"]:
        """The logits of every document, as `Classifier.forward` has them."""
        if ids is None:
            return self.of_rows(tokens, torch.ones_like(tokens))
        symbols, n_documents = self.read(tokens, ids)
        return torch.stack([bag(*given, n_documents) for bag, given in zip(self.bags, symbols, strict=True)]).sum(dim=0)

    def read(self, tokens: Symbols, ids: documents.Ids) -> tuple[list[tuple[Flat, Flat]], int]:
        """For each bag the symbols of packed documents and the number of the document of each; and how many these are.

        The documents are in row-major order of appearance.
        """
        real = ids != documents.PADDING
        document = ((documents.starts(ids) & real).flatten().cumsum(0) - 1)[real.flatten()]
        symbols, n_documents = [(tokens[real], document)], int(document[-1]) + 1
        if self.spelling is not None:
            spelt = self.spelling[tokens[real]].long()
            symbols.append((spelt[spelt != NONE], document[:, None].expand_as(spelt)[spelt != NONE]))
        return symbols, n_documents

    def of_rows(self, tokens: Symbols, mask: Mask) -> Float[Tensor, "batch n_labels"]:
        """As `Bag.of_rows`."""
        said = self.tokens.of_rows(tokens, mask)
        if self.bytes is None or self.spelling is None:
            return said
        spelt = self.spelling[tokens].long()
        there = ((spelt != NONE) & (mask != 0)[:, :, None]).flatten(1)
        place = torch.arange(there.shape[1], device=tokens.device)[None]
        # bytes to the front, in their order: what is none comes after all that are
        order = place.where(there, place + there.shape[1]).sort(dim=1).indices
        left = (place < there.sum(dim=1, keepdim=True)).long()
        return said + self.bytes.of_rows(spelt.flatten(1).gather(1, order), left)


def _shares(row: Symbols) -> Float[Tensor, "batch seq"]:
    """The weight of each n-gram, in sorted rows, shared out evenly over the places where it stands; 0 for NONE."""
    nth = (row != pad(row, (1, 0), value=NONE - 1)[:, :-1]).cumsum(dim=1) - 1
    count = torch.zeros_like(row).scatter_add(1, nth, torch.ones_like(row)).gather(1, nth).float()
    return (row != NONE) * (1 + count.log()) / count
