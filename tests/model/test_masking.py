"""What the masked objectives show of a text, and what they ask for."""

import numpy as np
import pytest
import torch

from model.batch import IGNORE
from model.objectives import Masking, masked, masked_next_token, next_token
from model.objectives._masking import hide

MASKING = Masking(rate=0.15, mask_id=100, special=(0, 1))
ROWS, SEQ = 200, 128


def text() -> torch.Tensor:
    tokens = torch.randint(2, 100, (ROWS, SEQ + 1), generator=torch.Generator().manual_seed(0))
    tokens[:, ::16] = 0
    tokens[:, 15::16] = 1
    return tokens


def documents() -> torch.Tensor:
    return (torch.arange(SEQ + 1) // 16).expand(ROWS, -1)


def keys(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**60, (ROWS,), generator=torch.Generator().manual_seed(seed))


def within(count: int, n: int, rate: float) -> bool:
    """Whether a count lies within five standard deviations of its binomial mean."""
    return abs(count - n * rate) < 5 * np.sqrt(n * rate * (1 - rate))


def test_the_share_of_hidden_tokens_and_what_hides_them_is_as_published():
    tokens = text()[:, :-1]
    shown, hidden = hide(tokens, keys(), MASKING)
    ordinary, n = tokens > 1, int(hidden.sum())
    assert not (hidden & ~ordinary).any()
    assert within(n, int(ordinary.sum()), 0.15)
    assert within(int((shown[hidden] == 100).sum()), n, 0.8)
    replaced = hidden & (shown != 100) & (shown != tokens)
    assert within(int(replaced.sum()), n, 0.1 * 99 / 100)  # one draw in a hundred is the token itself
    assert shown[replaced].max() < 100
    assert torch.equal(shown[~hidden], tokens[~hidden])


def test_what_is_hidden_depends_on_the_key_of_the_row_alone():
    tokens = text()[:, :-1]
    whole, part = hide(tokens, keys(), MASKING), hide(tokens[3:7], keys()[3:7], MASKING)
    assert torch.equal(whole[0][3:7], part[0])
    assert not torch.equal(whole[1], hide(tokens, keys(1), MASKING)[1])


def test_masked_asks_for_each_hidden_token_where_it_stood():
    inputs, targets = masked.examples(text(), documents(), keys(), MASKING)
    asked = targets != IGNORE
    assert torch.equal(asked, hide(text()[:, :-1], keys(), MASKING)[1])
    assert torch.equal(targets[asked], text()[:, :-1][asked])
    assert (inputs[asked] == 100).any()


def test_masked_next_token_asks_one_place_earlier_and_never_across_documents():
    _, targets = masked_next_token.examples(text(), documents(), keys(), MASKING)
    asked = targets != IGNORE
    hidden = hide(text()[:, :-1], keys(), MASKING)[1]
    assert torch.equal(targets[asked], text()[:, 1:][asked])
    assert not (asked & (documents()[:, :-1] != documents()[:, 1:])).any()
    assert (
        asked.sum() == hidden.sum()
    )  # a document begins with a special token, so none of its hidden ones is its first


@pytest.mark.parametrize("objective", [masked, masked_next_token, next_token])
def test_shapes_are_those_of_the_rows(objective: object):
    inputs, targets = objective.examples(text(), documents(), keys(), MASKING)
    assert inputs.shape == targets.shape == (ROWS, SEQ)
