"""Every module in `model/objectives/` is tested by being there."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from model import variants
from model.batch import IGNORE, Batch
from model.heads import Classifier, LanguageModel, swap_head
from model.objectives import Pretraining, classification, next_token, objective
from tests.model.toys import ids, language_model, tokens

PACKING = ids([0, 0, 0, 1, 1, 1, 1, -1], [0, 0, 0, 0, 1, 1, 2, 2])


def language_batch() -> Batch:
    text = tokens(2, 9)
    targets = text[:, 1:].where((PACKING != -1), IGNORE)
    return Batch(text[:, :-1].contiguous(), targets, PACKING, torch.tensor([1, 2]))


def label_batch() -> Batch:
    return Batch(tokens(2, 8), torch.tensor([0, 2, 1, IGNORE, 0]), PACKING, torch.tensor([1, 2]))


def classifier(**changes) -> Classifier:
    return swap_head(language_model(**changes), 3, "last", seed=0)


def several_labels_batch() -> Batch:
    targets = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [IGNORE] * 3, [1, 1, 1]])
    return Batch(tokens(2, 8), targets, PACKING, torch.tensor([1, 2]))


def several_labels(**changes) -> Classifier:
    return swap_head(language_model(**changes), 3, "last", seed=0, multi_label=True)


def both_ways(**changes) -> LanguageModel:
    return language_model(causal=False, **changes)


def case(name: str) -> tuple[Callable[..., torch.nn.Module], Callable[[], Batch]]:
    """A model and a batch for an objective."""
    module = variants.load("model.objectives", name)
    if isinstance(module, Pretraining):
        return language_model if module.CAUSAL else both_ways, language_batch
    return (several_labels, several_labels_batch) if name == "multi_label" else (classifier, label_batch)


def counted(name: str, targets: torch.Tensor) -> int:
    """Targets that count; a document with several labels is one."""
    asked = targets != IGNORE
    return int((asked.all(dim=1) if name == "multi_label" else asked).sum())


@pytest.mark.parametrize("name", variants.names("model.objectives"))
@pytest.mark.parametrize("autocast", [False, True])
def test_an_objective_answers_a_float32_sum_and_a_count_and_is_differentiable(name: str, autocast: bool):
    make_model, make_batch = case(name)
    model = make_model(dropout=0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = objective(name)(model, make_batch())
    loss.sum.backward()
    assert loss.sum.dtype == torch.float32
    assert loss.count == counted(name, make_batch().targets)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_next_token_is_the_cross_entropy_of_the_logits():
    model, batch = language_model(), language_batch()
    logits = model(batch.tokens, batch.document_ids, dropout_keys=batch.dropout_keys)
    want = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    torch.testing.assert_close(next_token.loss(model, batch).sum, want)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"activation_checkpointing": True}])
@pytest.mark.parametrize("asked", [0, 3])
def test_where_few_places_ask_the_loss_and_its_gradients_are_those_of_all_places(
    changes: dict, asked: int, monkeypatch: pytest.MonkeyPatch
):
    model, batch = both_ways(**changes), language_batch()
    batch.targets.flatten()[asked:] = IGNORE
    results = []
    for rare in (0.0, next_token.RARE):
        monkeypatch.setattr(next_token, "RARE", rare)
        loss = next_token.loss(model, batch)
        results.append([loss.sum.detach(), loss.count, *torch.autograd.grad(loss.sum, list(model.parameters()))])
    torch.testing.assert_close(*results)


def test_sums_and_counts_of_micro_batches_add_up_to_the_whole():
    model, batch = language_model(dropout=0.1), language_batch()
    parts = [Batch(*(x[i : i + 1] for x in vars(batch).values() if x is not None)) for i in range(2)]
    whole, split = next_token.loss(model, batch), [next_token.loss(model, part) for part in parts]
    torch.testing.assert_close(whole.sum, split[0].sum + split[1].sum)
    assert whole.count == split[0].count + split[1].count


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classification_is_the_smoothed_cross_entropy_of_the_labels_given(smoothing: float):
    model, batch = classifier(), label_batch()
    logits = model(batch.tokens, batch.document_ids)[[0, 1, 2, 4]]
    want = cross_entropy(logits, torch.tensor([0, 2, 1, 0]), reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(classification.loss(model, batch, label_smoothing=smoothing).sum, want)


def test_class_weights_scale_the_loss_of_their_labels():
    model, batch = classifier(), label_batch()
    logits = model(batch.tokens, batch.document_ids)[[0, 1, 2, 4]]
    want = cross_entropy(logits, torch.tensor([0, 2, 1, 0]), reduction="none") @ torch.tensor([1.0, 3.0, 2.0, 1.0])
    weighted = classification.loss(model, batch, class_weights=torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(weighted.sum, want)
    assert weighted.count == 4


@pytest.mark.parametrize("r_drop", [0.0, 5.0])
def test_weights_scale_what_each_document_adds(r_drop: float):
    model, batch = classifier(dropout=0.3), label_batch()
    weigh = partial(classification.loss, model, r_drop=r_drop, label_smoothing=0.1)
    plain = weigh(batch)
    torch.testing.assert_close(weigh(replace(batch, weights=torch.ones(5))).sum, plain.sum)
    each = [weigh(replace(batch, weights=row)) for row in torch.eye(5)]
    torch.testing.assert_close(sum(loss.sum for loss in each), plain.sum)
    weights = torch.tensor([1.0, 0.5, 2.0, 9.0, 0.0])
    weighted = weigh(replace(batch, weights=weights))
    torch.testing.assert_close(weighted.sum, sum(w * loss.sum for w, loss in zip(weights, each, strict=True)))
    assert each[3].sum == 0  # left out
    assert weighted.count == plain.count == 4


def test_r_drop_adds_how_far_two_readings_are_apart():
    still, noisy, batch = classifier(), classifier(dropout=0.3), label_batch()
    plain = classification.loss(still, batch).sum
    torch.testing.assert_close(classification.loss(still, batch, r_drop=5.0).sum, plain)  # nothing differs
    twice = classification.loss(noisy, batch, r_drop=1e-9).sum
    assert classification.loss(noisy, batch, r_drop=1.0).sum > twice
    silent = Batch(batch.tokens, batch.targets, batch.document_ids)
    torch.testing.assert_close(classification.loss(noisy, silent, r_drop=5.0).sum, plain)


def test_the_divergence_is_that_of_kullback_and_leibler_both_ways():
    one, other = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.5]])
    p, q = one.softmax(-1), other.softmax(-1)
    torch.testing.assert_close(classification.divergence(one, other), ((p - q) * (p / q).log()).sum())
    assert classification.divergence(one, one).abs() < 1e-6


def test_a_wrong_number_of_labels_is_refused():
    batch = Batch(tokens(2, 8), torch.tensor([0, 1]), PACKING)
    with pytest.raises(ValueError, match=r"targets has shape \(2,\) but the rows hold 5 documents"):
        classification.loss(classifier(), batch)


@pytest.mark.parametrize("name", variants.names("model.objectives"))
def test_one_batch_can_be_learned_by_heart(name: str):
    make_model, make_batch = case(name)
    model, batch = make_model(scale=1.0), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(80):
        loss = objective(name)(model, batch)
        optimizer.zero_grad()
        (loss.sum / loss.count).backward()
        optimizer.step()
    assert loss.sum / loss.count < 0.02
