"""What an exporter traces is the classifier: the same logits for one document a row, padded, in any batch."""

from typing import Any

import pytest
import torch

from model.heads import Classifier, swap_head
from model.pooling import POOLING
from model.rows import ROWS, Rows
from tests.model.toys import language_model, tokens

LENGTHS = [9, 1, 4, 12]


def classifier(pooling: str, **changes: Any) -> Classifier:
    return swap_head(language_model(**changes), 3, pooling, seed=1)


def alone(model: Classifier, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(row[:length][None]) for row, length in zip(ids, LENGTHS, strict=True)])


def test_there_is_a_form_for_every_pooling():
    assert set(POOLING) <= set(ROWS)


@pytest.mark.parametrize("pooling", sorted(POOLING))
@pytest.mark.parametrize(
    "changes", [{}, {"causal": False}, {"sliding_window": 4}, {"causal": False, "sliding_window": 3}], ids=str
)
def test_padded_rows_have_the_logits_of_their_documents(pooling: str, changes: dict):
    model, ids = classifier(pooling, **changes), tokens(len(LENGTHS), max(LENGTHS))
    mask = (torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]).long()
    with torch.no_grad():
        torch.testing.assert_close(Rows(model)(ids, mask), alone(model, ids), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(Rows(model)(ids * mask, mask), Rows(model)(ids, mask), atol=0, rtol=0)


def test_the_weights_keep_their_names_and_the_model_its_kernel():
    model = classifier("last", attention="sdpa")
    rows = Rows(model)
    assert {name: tuple(p.shape) for name, p in rows.named_parameters()} == {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }
    kernels = {block.attention.attend.__module__ for block in model.body.blocks}
    assert kernels == {"model.attention.sdpa"}
