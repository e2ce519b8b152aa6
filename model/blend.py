"""What a network and the n-grams of a text say of its label, as one distribution."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

Logits = Float[Tensor, "n n_labels"]


class Blend(nn.Module):
    """A mixture of two weighted sums of logits: `shares[0] * softmax(by[0] @ (deep, wide)) + shares[1] * softmax(...)`.

    One such sum is a product of experts (Hinton 2002). Fitted, it was surer than it was right where it was
    surest, which no temperature mends without making it too unsure elsewhere (benchmarks/RESULTS.md); a mixture can.
    Of several labels a text, each is mixed by itself, with sigmoids. As it comes, it is the plain sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(2, 2))
        """[component, (deep, wide)]"""
        self.share = nn.Parameter(torch.zeros(()))
        """The log odds of the first component."""
        self.scale = nn.Parameter(torch.ones(()))
        """What the logits of the mixture are multiplied by: the inverse of a temperature."""

    def forward(self, deep: Logits, wide: Logits, *, multi_label: bool) -> Logits:
        sums = torch.stack([by[0] * deep + by[1] * wide for by in self.by])
        shares = torch.stack([logsigmoid(self.share), logsigmoid(-self.share)])[:, None, None]
        if multi_label:
            mixed = [(shares + logsigmoid(answer)).logsumexp(0) for answer in (sums, -sums)]
            return self.scale * (mixed[0] - mixed[1])
        return self.scale * (shares + sums.log_softmax(-1)).logsumexp(0)
