"""A classifier as one graph of plain operators, one document a row, for exporters that cannot follow packed rows."""

import copy
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from model import rope
from model.attention import kernel
from model.decoder import Attention
from model.heads import Classifier
from model.masks import Pattern, causal, window

Hidden = Float[Tensor, "batch seq d_model"]
Mask = Int64[Tensor, "batch seq"]
Scores = Float[Tensor, "batch seq 1"]
Pooled = Float[Tensor, "batch d_model"]

KERNEL = "reference"
"""The attention kernel whose numbers define the others, and whose operators every exporter knows."""


def last(hidden: Hidden, mask: Mask, scores: Scores | None) -> Pooled:
    """As `pooling.last`."""
    del scores
    end = (mask.sum(dim=1, keepdim=True) - 1)[:, :, None].expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, end).squeeze(1)


def first(hidden: Hidden, mask: Mask, scores: Scores | None) -> Pooled:
    """As `pooling.first`."""
    del mask, scores
    return hidden[:, 0]


def mean(hidden: Hidden, mask: Mask, scores: Scores | None) -> Pooled:
    """As `pooling.mean`."""
    del scores
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def attention(hidden: Hidden, mask: Mask, scores: Scores | None) -> Pooled:
    """As `pooling.attention`."""
    assert scores is not None, "attention pooling needs scores"
    weights = scores.masked_fill(mask[:, :, None] == 0, float("-inf")).softmax(dim=1)
    return (weights * hidden).sum(dim=1)


ROWS: Mapping[str, Callable[[Hidden, Mask, Scores | None], Pooled]] = {
    "last": last,
    "first": first,
    "mean": mean,
    "attention": attention,
}
"""Every pooling of `model.pooling`, by its name there, for float32 rows that hold one document each."""


class Rows(nn.Module):
    """`(input_ids, attention_mask) -> logits`, as `classifier` computes them, with its weights under its names.

    Nothing in `forward` depends on the data, so that a tracer sees all of it; lengths may be dynamic.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        own = copy.deepcopy(classifier)
        self.cfg, self.body, self.head, self.ngrams = own.cfg, own.body, own.head, own.ngrams
        for module in self.body.modules():
            if isinstance(module, Attention):
                module.attend = kernel(KERNEL)

    def forward(self, input_ids: Int64[Tensor, "batch seq"], attention_mask: Mask) -> Float[Tensor, "batch n_labels"]:
        """Logits of each row's document, which begins at its left; the mask is 1 on it and 0 on the padding after."""
        hidden = self._hidden(input_ids, attention_mask)
        scores = None if self.head.query is None else self.head.query(hidden)
        deep = self.head.score(ROWS[self.head.pooling](hidden, attention_mask, scores))
        if self.ngrams is None:
            return deep
        wide = self.ngrams.of_rows(input_ids, attention_mask)
        return self.ngrams.blend(deep, wide, multi_label=self.head.multi_label)

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Hidden:
        """`Decoder.forward`, but positions are counted from the row's start: what padding makes of them is not read."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        rotation = rope.rotation(places[None], self.cfg.head_dim, self.cfg.rope_theta)
        pattern = _Drawn(self._allowed(places, attention_mask))
        x = self.body.embed(input_ids)
        for block in self.body.blocks:
            x = block(x, rotation, pattern)
        return self.body.norm(x)

    def _allowed(self, places: Tensor, attention_mask: Tensor) -> Bool[Tensor, "batch 1 seq seq"]:
        """Text sees text, and padding sees padding, so that no softmax is over nothing."""
        seen = attention_mask[:, None, :, None] == attention_mask[:, None, None, :]
        index = places, places, places[:, None], places
        if self.cfg.causal:
            seen = seen & causal(*index)
        if self.cfg.sliding_window is not None:
            seen = seen & window(self.cfg.sliding_window)(*index)
        return seen


class _Drawn(Pattern):
    """A pattern that is nothing but its mask: a tracer does not know the lengths that a `Pattern` is made of."""

    def __init__(self, allowed: Bool[Tensor, "batch 1 seq seq"]) -> None:
        self.__dict__["allowed"] = allowed
