import torch

from model.batch import IGNORE, Batch
from tests.model.toys import ids, tokens


def test_a_batch_moves_whole():
    batch = Batch(tokens(2, 3), torch.arange(2), ids([0, 0, 0], [0, 0, -1]), torch.tensor([1, 2]), torch.ones(2))
    batch = batch.to("meta")
    assert {x.device.type for x in vars(batch).values()} == {"meta"}


def test_a_batch_without_dropout_keys_or_weights_keeps_none():
    batch = Batch(tokens(1, 2), torch.full((1, 2), IGNORE), ids([0, 0])).to("cpu")
    assert batch.dropout_keys is None
    assert batch.weights is None
