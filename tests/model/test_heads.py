import pytest
import torch

from model.heads import Classifier, swap_head
from model.pooling import POOLING
from tests.model.toys import ids, language_model, tokens


def classifier(pooling: str, **changes) -> Classifier:
    return swap_head(language_model(**changes), 3, pooling, seed=0)


def test_a_head_swap_keeps_every_bit_of_the_body():
    model = language_model()
    before = {name: value.clone() for name, value in model.body.state_dict().items()}
    swapped = swap_head(model, 3, "last", seed=1)
    after = swapped.body.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_new_head_follows_its_seed_and_the_dtype_of_the_body():
    weights = [swap_head(language_model(), 3, "last", seed).head.score.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert swap_head(language_model().bfloat16(), 3, "last", 0).head.score.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_is_shared_only_when_tied(tied: bool):
    model = language_model(tie_embeddings=tied)
    assert (model.head.weight is model.body.embed.weight) == tied


@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_labelled_as_if_alone_in_order_of_appearance(pooling: str, causal: bool):
    model = classifier(pooling, causal=causal)
    text, packing = tokens(2, 8), ids([-1, 5, 5, 5, 2, 2, 2, 2], [7, 8, 8, 8, 8, 8, -1, -1])
    alone = [text[:1, 1:4], text[:1, 4:], text[1:, :1], text[1:, 1:6]]
    want = torch.cat([model(document) for document in alone])
    torch.testing.assert_close(model(text, packing), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("pad", [(3, 0), (0, 3), (2, 1)])
def test_padding_changes_no_label(pooling: str, pad: tuple[int, int]):
    model, text = classifier(pooling), tokens(2, 6)
    padded = torch.nn.functional.pad(text, pad)
    where = torch.nn.functional.pad(torch.zeros(2, 6, dtype=torch.int32), pad, value=-1)
    torch.testing.assert_close(model(padded, where), model(text), atol=1e-5, rtol=1e-5)


def test_poolings_pool_what_they_say():
    hidden = torch.arange(12.0).view(1, 6, 2)
    packing = ids([0, 0, 0, 1, 1, -1])
    odds = torch.tensor([1.0, 1.0, 2.0, 1.0, 3.0, 9.0]).log().view(1, 6, 1)
    assert POOLING["last"](hidden, packing, None).tolist() == [[4, 5], [8, 9]]
    assert POOLING["first"](hidden, packing, None).tolist() == [[0, 1], [6, 7]]
    assert POOLING["mean"](hidden, packing, None).tolist() == [[2, 3], [7, 8]]
    weighed = POOLING["attention"](hidden, packing, odds)
    torch.testing.assert_close(weighed, torch.tensor([[2.5, 3.5], [7.5, 8.5]]))
    assert POOLING["attention"](hidden, packing, odds + 1e4).isfinite().all()


@pytest.mark.parametrize("pooling", POOLING)
def test_pooling_is_differentiable_under_autocast(pooling: str):
    model = classifier(pooling)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(1, 4), ids([0, 0, 1, -1])).sum().backward()
    assert model.body.embed.weight.grad.isfinite().all()


def test_unknown_pooling_and_no_labels_are_refused():
    with pytest.raises(ValueError, match="pooling='max' must be one of last, first, mean, attention"):
        swap_head(language_model(), 3, "max", 0)
    with pytest.raises(ValueError, match="n_labels=0 must be >= 1"):
        swap_head(language_model(), 0, "last", 0)
