"""Hiding tokens: which, and by what, as a function of a key a row (Devlin et al., arXiv:1810.04805)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from model import counter

Tokens = Int64[Tensor, "rows seq"]
Keys = Int64[Tensor, " rows"]

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Of the hidden tokens, how many become the mask and how many another token; the rest stay and are asked for too."""


@dataclass(frozen=True, kw_only=True)
class Masking:
    """`rate` of the tokens is hidden, never one of `special`. `mask_id` follows the last id that a text can have."""

    rate: float
    mask_id: int
    special: tuple[int, ...]


def hide(tokens: Tokens, keys: Keys, masking: Masking) -> tuple[Tokens, Bool[Tensor, "rows seq"]]:
    """The tokens with some hidden, and where."""
    draw, how, other = counter.bits(keys, 0, tokens.shape[1], 3).long().add(2**31).unbind(-1)
    special = torch.isin(tokens, torch.tensor(masking.special, device=tokens.device))
    hidden = ~special & (draw < masking.rate * 2**32)
    masked = hidden & (how < MASK_SHARE * 2**32)
    replaced = hidden & ~masked & (how < (MASK_SHARE + RANDOM_SHARE) * 2**32)
    return tokens.masked_fill(masked, masking.mask_id).where(~replaced, other % masking.mask_id), hidden
